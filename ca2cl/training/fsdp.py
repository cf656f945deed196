"""FSDP2 engine: weights, gradients and optimizer state sharded over the processes.

torch's ``fully_shard`` (arXiv 2304.11277) cuts every parameter by rows. A block's weights are gathered before each pass
through it and freed after it, and its gradient is reduced to shards as soon as its backward is done. A process then
holds its shards, and the whole of a block or two at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ca2cl.errors import InputError
from ca2cl.runtime.tensor_files import Part, Whole
from ca2cl.training.engine import AccelerateEngine, OptimizerStep

_LISTS = (nn.Sequential, nn.ModuleList)


def blocks(network: nn.Module) -> list[nn.Module]:
    """Modules whose weights are gathered together: residual blocks, layers of a transformer.

    They are the innermost members of lists that are more than a single layer. What is in none of them (stem, heads) is
    gathered together.
    """
    found = [
        member
        for module in network.modules()
        if isinstance(module, _LISTS)
        for member in module.children()
        if any(member.children()) and any(True for _ in member.parameters()) and _is_called(member)
    ]
    names = set(found)
    return [module for module in dict.fromkeys(found) if names.isdisjoint(list(module.modules())[1:])]


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward pass of its own, in contrast to a mere list."""
    return type(module).forward is not nn.Module.forward


def shard(network: nn.Module, device: torch.device) -> nn.Module:
    """Cut the network's parameters over all processes, in place; ``build_optimizer`` comes after. Every rank calls it.

    Args:
        network: the same on every rank.
        device: where this process computes.

    Raises:
        InputError: torch is too old.
    """
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise InputError(
            f"run.fsdp is true: torch {torch.__version__} has no FSDP2 whose gradients are sums; use torch 2.9 or newer"
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*blocks(network), network):
        # The root's too: between passes, parameters are then shards without exception.
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        # gloo takes an average for a sum (pytorch#162338)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
    return network.to(device)  # what is no parameter


class _Shard(NamedTuple):
    """A trained parameter, and this rank's rows of it as the optimizer sees them."""

    parameter: Any
    rows: Tensor


class FsdpEngine(AccelerateEngine):
    """``AccelerateEngine`` with weights, gradients and optimizer state sharded by FSDP2.

    The optimizer sees this rank's rows as plain tensors: fused and foreach kernels work on these as they are.

    Args:
        accelerator: of ``build_accelerator``, of several processes.
        network: of ``shard``.
        optimizer: of its parameters; one that treats every number of a parameter alike.
        precision: as of ``AccelerateEngine``.
    """

    sharded = True

    def _prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Any, Any]:
        self._shards = {
            name: _Shard(parameter, _rows_of(parameter))
            for name, parameter in network.named_parameters()
            if parameter.requires_grad
        }
        rows = {id(one.parameter): one.rows for one in self._shards.values()}
        for group in optimizer.param_groups:
            group["params"] = [rows[id(parameter)] for parameter in group["params"]]
        return network, self.accelerator.prepare(optimizer)

    @contextmanager
    def micro_step(self, *, last: bool) -> Iterator[None]:
        """Gradients are reduced in every micro-batch: until then each process would hold all of them."""
        yield

    def _scaled(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)

    def optimizer_step(
        self, lr: float, clip_norm: float | None, loss: Tensor | None = None, step: int | None = None
    ) -> OptimizerStep:
        """As ``AccelerateEngine.optimizer_step``."""
        for parameter, rows in self._shards.values():
            rows.data = _rows_of(parameter)  # FSDP2 may have put them elsewhere
            rows.grad = None if parameter.grad is None else parameter.grad.to_local()
        return super().optimizer_step(lr, clip_norm, loss, step)

    def _clip(self, limit: float) -> Tensor:
        rows = [one.rows for one in self._shards.values()]
        norm = torch.nn.utils.get_total_norm([one.grad for one in rows if one.grad is not None])
        squares = norm.to(self.device, torch.float64).square()
        dist.all_reduce(squares)
        whole = squares.sqrt().to(norm.dtype)
        torch.nn.utils.clip_grads_with_norm_(rows, limit, whole)
        return whole

    def _discard_gradient(self) -> None:
        super()._discard_gradient()
        for parameter, _ in self._shards.values():
            parameter.grad = None

    def whole(self, parameter: Tensor) -> Tensor:
        """As ``AccelerateEngine.whole``; a collective."""
        return _gathered(parameter)

    def weights(self, module: nn.Module | None = None) -> dict[str, Whole]:
        """As ``AccelerateEngine.weights``."""
        return {
            name: Whole(tuple(value.shape), value.dtype, partial(_gathered, value))
            for name, value in (module or self.bare).state_dict().items()
        }

    def load_weights(self, parts: Mapping[str, Part]) -> None:
        """As ``AccelerateEngine.load_weights``; every rank reads its own rows."""
        own = self.bare.state_dict()
        state: dict[str, Tensor] = {}
        for name, part in parts.items():
            like = own.get(name)
            if isinstance(like, DTensor) and part.shape == tuple(like.shape):
                state[name] = _like(like, _own_rows(like, part).to(self.device))
            else:
                state[name] = part.read()
        self.bare.load_state_dict(state, strict=True)

    def _own_part(self, value: Tensor) -> Tensor:
        return _rows_of(value) if isinstance(value, DTensor) else super()._own_part(value)

    def _whole_of(self, like: Tensor, own: Tensor) -> Whole:
        if not isinstance(like, DTensor):
            return super()._whole_of(like, own)
        return Whole(tuple(like.shape), own.dtype, lambda: _gathered(_like(like, own)))

    def _read_own(self, like: Tensor, part: Part) -> Tensor:
        return _own_rows(like, part) if isinstance(like, DTensor) else super()._read_own(like, part)

    def _optimized(self, name: str, parameter: Tensor) -> Tensor:
        return self._shards[name].rows if name in self._shards else parameter

    def _moment(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return super()._moment(name, value)
        return self._whole_of(self._shards[name].parameter, value)

    def _own_moment(self, name: str, value: Any) -> Any:
        if not isinstance(value, Part) or not value.shape:
            return super()._own_moment(name, value)
        return self._read_own(self._shards[name].parameter, value)


def _rows_of(parameter: Any) -> Tensor:
    """This rank's, sharing its memory."""
    rows: Tensor = parameter.detach().to_local()
    return rows


@torch.no_grad()
def _gathered(value: Any) -> Tensor:
    whole: Tensor = value.full_tensor() if isinstance(value, DTensor) else value
    return whole


def _like(like: DTensor, rows: Tensor) -> DTensor:
    """``rows`` of this rank as a part of a tensor of the same shape and sharding."""
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _own_rows(like: DTensor, part: Part) -> Tensor:
    """Read this rank's rows: FSDP2 cuts as ``torch.chunk`` does."""
    rank, world, rows = like.device_mesh.get_local_rank(), like.device_mesh.size(), like.shape[0]
    each = -(-rows // world)
    return part.read(min(rank * each, rows), min((rank + 1) * each, rows))
