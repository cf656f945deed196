"""Bytes of activations that a pass keeps for its backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ca2cl.models.backbone import Backbone, outline

_TRIED_ROWS, _TRIED_SIZE = 1, 64


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
