"""accelerate engine: devices, gradient exchange, precision, optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from ca2cl.training.tensor_files import Part, Whole

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

    def optimizer_step(self, lr: float, clip_norm: float | None, loss: Tensor | None = None) -> OptimizerStep:
        """Apply the accumulated gradient, unless it is not finite, then discard it.

        With fused optimizers the device decides by itself, and the host does not wait for it.

        Args:
            lr: learning rate.
            clip_norm: largest norm of the whole gradient; None: any.
            loss: the step's loss, the same on every rank; the step is skipped where it is not finite, too.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
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

    def whole(self, parameter: Tensor) -> Tensor:
        """All of a parameter of ``bare``. Every rank calls it."""
        return parameter

    def whole_state(self, module: nn.Module) -> dict[str, Tensor]:
        """The state of a part of ``bare`` as whole tensors, on the main process. Every rank calls it."""
        return dict(module.state_dict())

    def weights(self) -> dict[str, Whole]:
        """The network's state. Every rank calls it."""
        return {name: Whole.of(value) for name, value in self.bare.state_dict().items()}

    def load_weights(self, parts: Mapping[str, Part]) -> None:
        """Load what ``weights`` gave, from a file. Every rank calls it.

        Raises:
            RuntimeError: it is of another network.
        """
        self.bare.load_state_dict({name: part.read() for name, part in parts.items()}, strict=True)

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer state by parameter: moments, ``Whole`` of the parameter's shape, and numbers. Every rank calls
        it."""
        names = self._trainable_names()
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
            for number, name in enumerate(self._trainable_names())
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

    def _trainable_names(self) -> list[str]:
        return [name for name, parameter in self.bare.named_parameters() if parameter.requires_grad]

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
