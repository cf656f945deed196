"""accelerate engine: devices, gradient exchange, precision, optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from ca2cl.runtime.tensor_files import Part, Whole
from ca2cl.training.ema import Ema
from ca2cl.training.param_groups import set_rates

Precision = Literal["no", "fp16", "bf16"]


class OptimizerStep(NamedTuple):
    """Result of a step, as scalars on the device: nobody has waited for them.

    Attributes:
        grad_norm: norm of the whole gradient before clipping.
        skipped: whether the step was skipped because loss or gradient is not finite.
    """

    grad_norm: Tensor
    skipped: Tensor


class AccelerateEngine:
    """Accumulates a method's gradient (``methods.base.Engine``) and steps the optimizer exactly once a step.

    Args:
        accelerator: of ``build_accelerator``.
        network: to be trained. Its attribute ``autocast_dtype`` is set here; it autocasts its passes to that precision.
        optimizer: of its parameters.
        precision: bf16 or fp16 autocasts the network; fp16 scales the loss, too.

    Attributes:
        bare: the network inside the engine's wrapper.
        ema: moving average of the weights, or None (``keep_average`` starts one).
        sharded: see ``methods.base.Engine``.
        scaler: torch's loss scaling for fp16, or None. Ranks agree on whether a gradient overflowed.
    """

    memory_format = torch.channels_last
    sharded = False

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision = "no",
    ) -> None:
        self.accelerator = accelerator
        device = accelerator.device.type
        if precision != "no":
            network.autocast_dtype = torch.float16 if precision == "fp16" else torch.bfloat16  # type: ignore[assignment]
        self.scaler = _scaler(device, accelerator.num_processes) if precision == "fp16" else None
        self.optimizer_name = type(optimizer).__name__.lower()
        # Not accelerate's unwrap_model: it imports DeepSpeed wherever that is installed, which imports MLflow and costs
        # every process of a job four seconds.
        self.bare: Any = network
        self.network, self.optimizer = self._prepare(network, optimizer)
        buffers = [buffer for buffer in self.bare.buffers() if buffer is not None]
        # of one precision each, which one kernel copies
        kinds = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in {one.dtype for one in buffers}]
        self.ema: Ema | None = None
        self._kept = [(kind, [buffer.clone() for buffer in kind]) for kind in kinds]

    def _prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        """The network on its device within its wrapper, and the optimizer within accelerate's."""
        network = network.to(self.accelerator.device, memory_format=self.memory_format)  # type: ignore[call-overload]
        prepared: tuple[Any, Any] = self.accelerator.prepare(network, optimizer)
        return prepared

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return cast(torch.device, self.accelerator.device)

    @property
    def loss_scale(self) -> float | Tensor:
        """fp16's current scale, a scalar on the device, which the host does not wait for; 1 in any other precision."""
        return 1.0 if self.scaler is None else self.scaler.scale(torch.ones((), device=self.device))

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Gradients are exchanged in the last micro-batch of a step only."""
        if last:
            yield
        else:
            with self.accelerator.no_sync(self.network):
                yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss`` summed over ranks: the wrapper averages."""
        self.accelerator.backward(self._scaled(loss))

    def _scaled(self, loss: Tensor) -> Tensor:
        whole = loss * self.accelerator.num_processes
        return whole if self.scaler is None else cast(Tensor, self.scaler.scale(whole))

    def optimizer_step(
        self, lr: float, clip_norm: float | None, loss: Tensor | None = None, step: int | None = None
    ) -> OptimizerStep:
        """Apply the accumulated gradient, unless it is not finite, then discard it.

        With fused optimizers the device decides by itself, and the host does not wait for it.

        Args:
            lr: learning rate, which groups scale (``param_groups``).
            clip_norm: largest norm of the whole gradient, that of frozen parameters included; None: any.
            loss: the step's loss, the same on every rank; the step is skipped where it is not finite, too.
            step: number of optimizer steps before this one, for groups that are frozen at first; None: none is.
        """
        set_rates(self.optimizer.param_groups, lr, step)
        inner = self.optimizer.optimizer
        if self.scaler is not None:
            self.scaler.unscale_(inner)
        limit = float("inf") if clip_norm is None else clip_norm
        norm = self._clip(limit)
        skipped = ~norm.isfinite()  # the whole gradient's, so ranks agree
        if loss is not None:
            skipped = skipped | ~loss.isfinite()
        _apply(inner, skipped)
        if self.scaler is not None:
            self.scaler.update()
        self._restore_buffers(skipped)
        self._discard_gradient()
        return OptimizerStep(norm, skipped)

    def keep_average(self, decay: float | None) -> None:
        """Average the weights of the steps from here on, and the buffers (``training.ema``); None: do not.

        What is not trained, a teacher, is not averaged.
        """
        named = self.bare.state_dict(keep_vars=True) if decay is not None else {}
        once = {id(x): (name, x) for name, x in named.items() if x.requires_grad or not isinstance(x, nn.Parameter)}
        self._averaged: dict[str, Tensor] = dict(once.values())
        self.ema = None if decay is None else Ema(self._own_parts, decay)

    def _own_parts(self) -> dict[str, Tensor]:
        """What this rank holds of every averaged tensor, sharing its memory."""
        return {name: self._own_part(value) for name, value in self._averaged.items()}

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the network has its averaged weights, if an average is kept."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def average(self, outcome: OptimizerStep) -> None:
        """Add the weights after an optimizer step to their moving average, if one is kept."""
        if self.ema is not None:
            self.ema.update(outcome.skipped)

    def _clip(self, limit: float) -> Tensor:
        """Scale the whole gradient down to a norm of ``limit``; its norm before."""
        norm: Tensor = self.accelerator.clip_grad_norm_(self.network.parameters(), limit)
        return norm

    def _discard_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def keep_buffers(self) -> None:
        """Save the buffers: a forward pass that overflows would spoil BatchNorm's running statistics for good."""
        for buffers, kept in self._kept:
            torch._foreach_copy_(kept, buffers)

    def drop_step(self) -> None:
        """Skip the step: discard the gradient and restore the buffers saved by ``keep_buffers``."""
        self._discard_gradient()
        self._restore_buffers()

    @torch.no_grad()
    def _restore_buffers(self, skipped: Tensor | None = None) -> None:
        """Take the buffers back to ``keep_buffers``; with ``skipped``, only where that is true."""
        for buffers, kept in self._kept:
            if skipped is None:
                torch._foreach_copy_(buffers, kept)
                continue
            for buffer, before in zip(buffers, kept, strict=True):
                torch.where(skipped, before, buffer, out=buffer)

    def average_state(self) -> dict[str, Whole]:
        """The averages by the names of ``weights``. Every rank calls it."""
        own = {} if self.ema is None else self.ema.state()
        return {name: self._whole_of(self._averaged[name], value) for name, value in own.items()}

    def load_average(self, parts: Mapping[str, Part] | None) -> None:
        """Load what ``average_state`` gave, from a file; None: begin again with the weights as they are.

        Raises:
            RuntimeError: it is of another network.
        """
        assert self.ema is not None
        if parts is not None and parts.keys() != self._averaged.keys():
            raise RuntimeError(f"another network's average: {min(parts.keys() ^ self._averaged.keys())}")
        like = self._averaged
        self.ema.load({name: self._read_own(like[name], part) for name, part in (parts or {}).items()})

    def _own_part(self, value: Tensor) -> Tensor:
        """What this rank holds of a tensor of ``bare``, sharing its memory."""
        return value.detach()

    def _whole_of(self, like: Tensor, own: Tensor) -> Whole:
        """A tensor that is shared out as ``like``, of ``bare``, is."""
        return Whole.of(own)

    def _read_own(self, like: Tensor, part: Part) -> Tensor:
        """What this rank holds of it, shared out as ``like``, of ``bare``, is."""
        return part.read()

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter of ``bare``. Every rank calls it."""
        return parameter

    def weights(self, module: nn.Module | None = None) -> dict[str, Whole]:
        """The state of ``bare``, or of a module in it."""
        return {name: Whole.of(value) for name, value in (module or self.bare).state_dict().items()}

    def load_weights(self, parts: Mapping[str, Part]) -> None:
        """Load what ``weights`` of all gave, from a file. Every rank calls it.

        Raises:
            RuntimeError: it is of another network.
        """
        self.bare.load_state_dict({name: part.read() for name, part in parts.items()}, strict=True)

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer state by parameter: moments, ``Whole`` of the parameter's shape, and numbers."""
        names = self._names_by_group()
        state = self.optimizer.state_dict()["state"]
        return {
            names[number]: {key: self._moment(names[number], value) for key, value in entry.items()}
            for number, entry in state.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Load the result of ``optimizer_state``, of this or another engine, from a file. Every rank calls it.

        Args:
            state: by parameter: each moment as ``Part``, and numbers.
        """
        entries = {
            number: {key: self._own_moment(name, value) for key, value in state[name].items()}
            for number, name in enumerate(self._names_by_group())
            if name in state
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def _moment(self, name: str, value: Any) -> Any:
        """A parameter's ``value`` of the optimizer's state, for ``optimizer_state``."""
        return Whole.of(value) if isinstance(value, Tensor) else value

    def _own_moment(self, name: str, value: Any) -> Any:
        """What this rank's optimizer keeps of a ``value`` of ``optimizer_state``."""
        return value.read() if isinstance(value, Part) else value

    def _names_by_group(self) -> list[str]:
        """Names of the trained parameters in the order in which torch's optimizers number them."""
        names = {id(self._optimized(name, parameter)): name for name, parameter in self.bare.named_parameters()}
        return [names[id(parameter)] for group in self.optimizer.param_groups for parameter in group["params"]]

    def _optimized(self, name: str, parameter: Tensor) -> Tensor:
        """What the optimizer has of a parameter."""
        return parameter

    def gather_list(self, items: list[Any]) -> list[Any]:
        """The items of every rank, on every rank."""
        if self.accelerator.num_processes == 1:
            return items
        return cast(list[Any], gather_object(items))


def _apply(optimizer: Any, skipped: Tensor) -> None:
    """Step ``optimizer`` unless ``skipped``."""
    if not all(group.get("fused") for group in optimizer.param_groups):
        if not bool(skipped):
            optimizer.step()
        return
    # as GradScaler does it: fused kernels leave weights, moments and counts alone where this is 1
    optimizer.found_inf, optimizer.grad_scale = skipped.float(), None
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf, optimizer.grad_scale


def _scaler(device: str, processes: int) -> torch.amp.GradScaler:
    return ShardedGradScaler(device) if processes > 1 else torch.amp.GradScaler(device)
