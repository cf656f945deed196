"""Rows of every process, with their gradient.

Shapes: B local batch, G global batch, W world size, D embedding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Rank and world size; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class _AllGather(torch.autograd.Function):
    """Concatenation over ranks whose backward sums every rank's gradient of our rows.

    ``accelerator.gather`` has no gradient (accelerate#1154); a gather that returns only the own slice of the local
    gradient loses what the other ranks' rows contribute (open_clip#616).
    """

    @staticmethod
    def forward(ctx: Any, local_BD: Tensor) -> Tensor:
        rank, size = world()
        ctx.rows = slice(rank * len(local_BD), (rank + 1) * len(local_BD))
        parts = [torch.empty_like(local_BD) for _ in range(size)]
        dist.all_gather(parts, local_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # An all-reduce and a slice, because gloo has no reduce-scatter; the rows are a few megabytes at most.
        total_GD = grads[0].contiguous().clone()
        dist.all_reduce(total_GD)
        return total_GD[ctx.rows]


def gather_rows(local_BD: Tensor) -> Tensor:
    """Every rank's rows (G, D) in rank order, differentiable; all ranks must call it with equal B."""
    if world()[1] == 1:
        return local_BD
    gathered: Tensor = _AllGather.apply(local_BD)
    return gathered


def canonical_order(positions_B: Tensor) -> tuple[Tensor, Tensor]:
    """How gathered rows are put into the order that does not depend on the hardware.

    Args:
        positions_B: the local rows' places in the global batch, int64.

    Returns:
        order (G,), such that ``gather_rows(x)[order]`` is canonical, and own (B,), the places of the local rows in it.
    """
    everywhere_G = gather_rows(positions_B.detach())
    order_G = torch.argsort(everywhere_G)
    own_B = torch.searchsorted(everywhere_G[order_G], positions_B)
    return order_G, own_B


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient; a new tensor."""
    total = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total
