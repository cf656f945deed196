"""Peak memory of a step, followed on fake tensors.

Legend: B rows of a micro-batch, S side of a view in pixels.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ca2cl.methods.base import LocalEngine, Method, Teacher, Tiles
from ca2cl.pretrain.memory.activations import StepMemory

_ROWS = (16, 64)
"""Rows of the micro-batches that are tried: memory is linear in them where activations outweigh the rest."""
_MORE_ROWS = 256
"""Tried too where activations are recomputed: those of few rows weigh less than gradients that are carried along."""


def step_memory(
    method: Method,
    build: Callable[[], nn.Module],
    image_size: int,
    view_dtype: torch.dtype,
    device: torch.device,
    *,
    micro_batches: int,
    recomputed: bool = False,
    sharded: bool = False,
) -> StepMemory:
    """Run ``method.step`` on fake tensors and follow which of them are alive; nothing is computed or allocated.

    It is the real step, so it holds as many graphs at a time as that does. Attention is a fused kernel, which keeps no
    matrix of tokens by tokens. What kernels use inside is not seen.

    Args:
        method: with its teacher, if it needs one.
        build: makes the network, on the meta device.
        image_size: S.
        view_dtype: of the views.
        device: whose operators are followed; cuda needs a GPU.
        micro_batches: 1: a process's whole share at a time; 2: the way of several micro-batches.
        recomputed: ``build`` makes a network that computes activations again.
        sharded: the way of an engine whose ranks share the parameters (``methods.base.Engine``).
    """
    engine = _ShardedEngine if sharded else LocalEngine
    points = []
    for count in (*_ROWS, _MORE_ROWS) if recomputed else _ROWS:
        rows = count * -(-method.least_tiles // _ROWS[0])
        points.append((rows, _peak(method, engine, build(), rows, image_size, view_dtype, device, micro_batches)))
    return StepMemory(tuple(points))


def teacher_bytes(
    teacher: Teacher, image_size: int, view_dtype: torch.dtype, device: torch.device, rows: tuple[int, int] = (4, 8)
) -> float:
    """Bytes that a teacher's pass holds at its peak for each tile, followed in the same way.

    Args:
        teacher: on the device.
        image_size: S.
        view_dtype: of the views.
        device: where they are.
        rows: of the two passes that are tried.
    """
    peaks = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        for count in rows:
            x_BCHW = torch.empty(count, 3, image_size, image_size, dtype=view_dtype, device=device)
            with LiveBytes() as live:
                teacher(x_BCHW)
            peaks.append(live.peak)
    return float(max(0, peaks[1] - peaks[0])) / (rows[1] - rows[0])


class _ShardedEngine(LocalEngine):
    sharded = True


def _peak(
    method: Method,
    engine: type[LocalEngine],
    network: nn.Module,
    rows: int,
    image_size: int,
    dtype: torch.dtype,
    device: torch.device,
    micro_batches: int,
) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        materialise(network, device)
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        batches = [_batch(method, rows, image_size, dtype, device, number) for number in range(micro_batches)]
        with LiveBytes() as live:
            method.step(engine(network.train()), batches)
    return int(live.peak)


def materialise(network: nn.Module, device: torch.device) -> None:
    """Give every tensor of a network of the meta device a fake one of another; inside ``FakeTensorMode``."""
    made: dict[int, Tensor] = {}
    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    parameter = isinstance(tensor, nn.Parameter)
                    made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if parameter else empty
                tensors[name] = made[id(tensor)]  # type: ignore[assignment]


def _batch(method: Method, rows: int, image_size: int, dtype: torch.dtype, device: torch.device, number: int) -> Any:
    positions = torch.arange(number * rows, (number + 1) * rows, device=device)
    pixels = torch.empty(rows, image_size, image_size, 3, dtype=torch.uint8, device=device)
    tiles = Tiles(pixels, positions, 0, positions, slides=positions)
    return method.views(tiles, _FakeViews(image_size, dtype))


class _FakeViews:
    """Views without numbers (``methods.base.Views``)."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self._size, self._dtype = size, dtype

    def __call__(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> tuple[Tensor, Tensor]:
        return self.strong(tiles_BHWC, key_hash_B, epoch), self.weak(tiles_BHWC, key_hash_B, epoch)

    def strong(self, tiles_BHWC: Tensor, key_hash_B: Tensor, epoch: int) -> Tensor:
        shape = (len(tiles_BHWC), 3, self._size, self._size)
        kind, device = self._dtype, tiles_BHWC.device
        return torch.empty(shape, dtype=kind, device=device, memory_format=torch.channels_last)

    weak = strong


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all storages that operators inside this context make, until they are freed.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, Tensor) and id(one.untyped_storage()) not in given:
                self._see(one.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)
