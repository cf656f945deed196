"""DeepSpeed ZeRO-1 and ZeRO-2 engine.

The engine is driven directly and not by ``accelerator.backward``, which steps the optimizer in every call
(accelerate#2951). ZeRO's flat fp32 partitions are turned into whole tensors by parameter for checkpoints, so that these
do not depend on the engine. deepspeed itself is imported by accelerate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.errors import InputError
from ca2cl.runtime.tensor_files import Part, Whole
from ca2cl.training.engine import AccelerateEngine, OptimizerStep, Precision
from ca2cl.training.param_groups import set_rates

BUCKET = 500_000_000
"""Most numbers in the buffer through which gradients are exchanged; DeepSpeed's own default."""


class DeepSpeedEngine(AccelerateEngine):
    """``AccelerateEngine`` with gradients and optimizer state sharded by ZeRO.

    Args:
        accelerator: of ``build_accelerator`` under a DeepSpeed launcher.
        network: what is trained.
        optimizer: one that treats every number of a parameter alike.
        precision: as of ``AccelerateEngine``.
        optim: the optimizer's name and ``clip_norm``, which becomes part of DeepSpeed's configuration.
        micro_batch_size: tiles that a process holds at a time.

    Raises:
        InputError: ZeRO-3 or LARS.
    """

    # ZeRO copies weights into flat buffers, and requires them to be contiguous.
    memory_format = torch.contiguous_format

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: Precision,
        optim: OptimConfig,
        micro_batch_size: int,
    ) -> None:
        plugin: Any = accelerator.state.deepspeed_plugin
        _check(plugin.zero_stage, optim)
        for half in ("fp16", "bf16"):
            if plugin.deepspeed_config.get(half, {}).get("enabled") is True:
                raise InputError(f"{half} is enabled in DeepSpeed's configuration: leave it out, run.precision decides")
        # By default a buffer of 2 GB; one of the model's size exchanges the gradient in one piece as well.
        numbers = sum(p.numel() for p in network.parameters() if p.requires_grad)
        zero = plugin.deepspeed_config.setdefault("zero_optimization", {})
        zero.setdefault("reduce_bucket_size", min(BUCKET, numbers))
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=micro_batch_size,
            gradient_accumulation_steps=1,
            gradient_clipping=optim.clip_norm or 0.0,
        )
        self._clip_norm = optim.clip_norm
        super().__init__(accelerator, network, optimizer, precision)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Gradients are complete, and sharded, after the last micro-batch of a step."""
        self.network.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss`` summed over ranks: ZeRO averages."""
        self.network.backward(self._scaled(loss))

    def optimizer_step(
        self, lr: float, clip_norm: float | None, loss: Tensor | None = None, step: int | None = None
    ) -> OptimizerStep:
        """As ``AccelerateEngine.optimizer_step``; the host waits, as ZeRO does."""
        assert clip_norm == self._clip_norm, "DeepSpeed was configured with another optim.clip_norm"
        set_rates(self.optimizer.param_groups, lr, step)
        if loss is not None and not bool(loss.isfinite()):
            self.drop_step()
            return self._result(float("nan"), skipped=True)
        shards = _Shards(self.network)
        if self.scaler is None:
            shards.step()
            skipped = not self.network.was_step_applied()
        else:
            self.scaler.unscale_(cast(torch.optim.Optimizer, shards))
            skipped = self._step_scaled(shards)
        if skipped:
            self.drop_step()
        return self._result(float("inf") if skipped else float(self.network.get_global_grad_norm()), skipped=skipped)

    def _result(self, norm: float, *, skipped: bool) -> OptimizerStep:
        return OptimizerStep(torch.tensor(norm, device=self.device), torch.tensor(skipped, device=self.device))

    def _step_scaled(self, optimizer: Any) -> bool:
        """Step ``optimizer``, unless its gradient, unscaled by now, overflowed on any rank; whether it did."""
        assert self.scaler is not None
        before = self.loss_scale
        self.scaler.step(optimizer)
        self.scaler.update()
        return bool(self.loss_scale < before)

    def drop_step(self) -> None:
        """Skip the step: discard the gradient, whole and sharded, and restore the buffers."""
        zero = self.network.optimizer
        zero.zero_grad(set_to_none=True)
        for group in zero.averaged_gradients:
            zero.averaged_gradients[group] = None
        self._restore_buffers()

    def optimizer_state(self) -> dict[str, dict[str, Any]]:
        """As ``AccelerateEngine.optimizer_state``, from every rank's shards, one parameter after another."""
        state: dict[str, dict[str, Any]] = {}
        for flat, parameters in self._partitions():
            own = self.network.optimizer.optimizer.state.get(flat, {})
            for name, parameter in parameters:
                entry = state[name] = {}
                for key, value in own.items():
                    if isinstance(value, Tensor) and value.shape == flat.shape:
                        entry[key] = Whole(tuple(parameter.shape), value.dtype, partial(_joined, parameter, value))
                    else:
                        entry[key] = self._moment(name, value)
        return state

    def load_optimizer_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """As ``AccelerateEngine.load_optimizer_state``: every rank takes its shard. The flat fp32 partitions are
        refreshed from the weights, which have been loaded before."""
        zero = self.network.optimizer
        zero.refresh_fp32_params()
        for flat, parameters in self._partitions():
            first = state.get(parameters[0][0], {})
            for key, value in first.items():
                if not isinstance(value, Part) or not value.shape:
                    zero.optimizer.state[flat][key] = self._own_moment("", value)
                    continue
                shard = zero.optimizer.state[flat][key] = torch.zeros_like(flat)
                for name, parameter in parameters:
                    _take_shard(parameter, state[name][key].read(), shard)

    def _partitions(self) -> list[tuple[Tensor, list[tuple[str, Any]]]]:
        """This rank's flat fp32 partition of every parameter group, and the whole group's parameters."""
        zero = self.network.optimizer
        names = {id(parameter): name for name, parameter in self.bare.named_parameters()}
        return [
            (flat, [(names[id(parameter)], parameter) for parameter in group])
            for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
        ]


class _Shards:
    """Adapter that shows a ``GradScaler`` this rank's shard of ZeRO's gradient as an optimizer."""

    def __init__(self, network: Any) -> None:
        self.network = network
        shards = [shard for group in network.optimizer.averaged_gradients.values() for shard in group]
        self.param_groups = [{"params": [_with_itself_as_gradient(shard) for shard in shards]}]

    def step(self) -> None:
        before = self.network.global_steps
        self.network.step()
        assert self.network.global_steps == before + 1, "one call of step is one optimizer step"


def _with_itself_as_gradient(shard: Tensor) -> Tensor:
    view = shard.detach()
    view.grad = shard
    return view


def _check(stage: int, optim: OptimConfig) -> None:
    if stage not in (1, 2):
        raise InputError(
            f"deepspeed_config.zero_stage is {stage}: the step's graph spans several forwards, which ZeRO-1 and ZeRO-2 "
            "allow; use accelerate_configs/deepspeed_zero2.yaml, or multi_gpu.yaml with --run.fsdp true"
        )
    if optim.name == "lars":
        raise InputError("optim.name is 'lars': ZeRO flattens the layers that LARS tells apart; use adam, adamw or sgd")


def _joined(parameter: Any, shard: Tensor) -> Tensor:
    """The whole moment of a parameter from every rank's shard of it; one collective."""
    whole = torch.zeros(parameter.numel(), dtype=shard.dtype, device=shard.device)
    mapping = parameter._hp_mapping
    if mapping is not None:  # this rank holds a part of it
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        whole.narrow(0, here.start, here.numel).copy_(shard.narrow(0, there.start, there.numel))
    dist.all_reduce(whole)
    return whole.view(parameter.shape)


def _take_shard(parameter: Any, whole: Tensor, shard: Tensor) -> None:
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        part = whole.flatten().narrow(0, here.start, here.numel)
        shard.narrow(0, there.start, there.numel).copy_(part)
