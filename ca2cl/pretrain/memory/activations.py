"""Quick estimate of a step's memory, from a trial on small tiles.

``dry_step`` is the exact one, and there are two because every job makes this one at its start: of a step with the
adversary it takes .1 CPU seconds for ResNet-18, .2 to .7 for ViT-S and 1.4 for ViT-L, where the exact one takes 1 to 2,
1.5 to 4 and 2 to 6, and it works for a user's method whose step cannot be followed without numbers. They agree within
``check.SURE`` and ``check.LIKELY`` (``tests/unit/pretrain/test_needs.py``).
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ca2cl.methods.base import Method
from ca2cl.models.backbone import Backbone, outline

_TRIED_ROWS, _TRIED_SIZE = 1, 64
_NUMBER = 4


class StepMemory(NamedTuple):
    """What a step holds at its peak beside weights, their gradients, optimizer state and views, in bytes.

    Attributes:
        points: (rows of a micro-batch, bytes), in order of the rows; it is taken to be linear in between and beyond.
    """

    points: tuple[tuple[int, float], ...]

    def of(self, rows: int) -> float:
        """Bytes with a micro-batch of that many rows."""
        place = bisect(self.points, rows, 1, len(self.points) - 1, key=lambda point: point[0])
        (few, low), (many, high) = self.points[place - 1 : place + 1]
        return max(0.0, low + (high - low) / (many - few) * (rows - few))

    @property
    def a_tile(self) -> float:
        """Bytes that another tile takes, where activations outweigh the rest."""
        (few, low), (many, high) = self.points[-2:]
        return (high - low) / (many - few)


def quick_step(
    method: Method, arch: str, image_size: int, precision: str, *, recomputed: bool = False, sharded: bool = False
) -> StepMemory:
    """Estimate a step from one pass.

    Args:
        method: whose step it is.
        arch: of the encoder.
        image_size: side of the views in pixels.
        precision: that of the job.
        recomputed: as of ``bytes_a_tile``.
        sharded: the engine is: one graph at a time.
    """
    graphs = 1 if sharded else method.graphs
    a_tile = graphs * bytes_a_tile(method.build, arch, image_size, precision, recomputed=recomputed, graphs=graphs)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = method.build(outline(arch, "frozen", image_size=image_size))
    numbers = [p.numel() for p in network.parameters() if p.requires_grad]
    carried = 0 if sharded else method.carried * sum(numbers)
    fixed = float(_NUMBER * (carried + max(numbers)))  # a layer's gradient is made before it is added
    return StepMemory(((0, fixed), (1, fixed + a_tile)))


def bytes_a_tile(
    build: Callable[[Backbone], nn.Module],
    arch: str,
    image_size: int,
    precision: str,
    *,
    recomputed: bool = False,
    graphs: int = 2,
) -> float:
    """Bytes that autograd saves for one tile in one pass, extrapolated from small tiles by the number of pixels.

    Args:
        build: of the method, the network around an encoder.
        arch: of the encoder.
        image_size: side of the tile in pixels.
        precision: that of the job.
        recomputed: blocks keep their input only. The one whose backward pass is under way has its activations, too; of
            all passes whose graphs a step holds it is one at a time.
        graphs: how many these are (``Method.graphs``).
    """
    encoder = outline(arch, "frozen", image_size=image_size)  # sync would wait for the other ranks
    tried = math.ceil(_TRIED_SIZE / encoder.patch_size) * encoder.patch_size
    if tried != image_size:
        encoder = outline(arch, "frozen", image_size=tried)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build(encoder).train()
    network = network.to_empty(device="cpu")
    for tensor in (*network.parameters(), *network.buffers()):  # its values do not matter, and take time to draw
        tensor.data.zero_()
    network.autocast_dtype = None if precision == "no" else torch.bfloat16  # type: ignore[assignment]  # fp16 is as large, and slow on CPUs
    blocks = encoder.blocks() if recomputed else []
    one, two = (_kept_bytes(network, rows * _TRIED_ROWS, tried, blocks) for rows in (1, 2))
    of_blocks = max((b - a for a, b in zip(one[1:], two[1:], strict=True)), default=0)
    return (two[0] - one[0] + of_blocks / graphs) / _TRIED_ROWS * (image_size / tried) ** 2


class _Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes of what autograd saves inside this context."""

    def __init__(self) -> None:
        super().__init__(self.keep, lambda tensor: tensor)
        self._bytes: dict[int, int] = {}
        self._alive: list[Tensor] = []  # an address must not be reused while counting

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor``, counted."""
        storage = tensor.untyped_storage()
        self._bytes[storage.data_ptr()] = storage.nbytes()
        self._alive.append(tensor.detach())
        # Of a layer's own output the graph would hold a tensor that holds the graph, and neither would ever be freed.
        return self._alive[-1]

    def total(self) -> int:
        """Bytes so far."""
        return sum(self._bytes.values())


def _kept_bytes(network: nn.Module, rows: int, size: int, blocks: Sequence[nn.Module] = ()) -> list[int]:
    """Bytes that a pass saves, of ``blocks`` only their inputs; then the bytes inside each of ``blocks``."""
    whole, inside = _Saved(), [_Saved() for _ in blocks]
    with ExitStack() as hooks, whole:
        for block, counter in zip(blocks, inside, strict=True):
            hooks.callback(block.register_forward_pre_hook(partial(_enter, whole, counter)).remove)
            hooks.callback(block.register_forward_hook(partial(_leave, counter)).remove)
        network(torch.zeros(rows, 3, size, size))
    return [whole.total(), *(counter.total() for counter in inside)]


def _enter(whole: _Saved, counter: _Saved, block: nn.Module, args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, Tensor):
            whole.keep(value)
    counter.__enter__()


def _leave(counter: _Saved, *_: Any) -> None:
    counter.__exit__(None, None, None)
