"""Differentiable gather of rows, in an order independent of the hardware.

Gathering has no gradient here, and needs none: each rank works out the whole loss's gradient with respect to its own
rows (``nt_xent``, ``terms``), from the gathered ones. So nothing can be lost or counted W times in a backward
collective (open_clip#616, accelerate#1154), no rank waits in one, and a row's gradient is the same to the last bit on
any rank.

Shapes: B local batch, G global batch, W world size, D embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """Rank and world size; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_rows(local_B: Tensor) -> Tensor:
    """Every rank's rows (G, ...) in rank order, without gradient; all ranks must call it with equal B."""
    local_B = local_B.detach()
    if world()[1] == 1:
        return local_B
    parts = [torch.empty_like(local_B, memory_format=torch.contiguous_format) for _ in range(world()[1])]
    dist.all_gather(parts, local_B.contiguous())
    return torch.cat(parts)


class Rows(NamedTuple):
    """Which rows of the global batch the local ones are.

    Attributes:
        order: (G,), such that ``gather_rows(x)[order]`` is in canonical order.
        own: (B,), the places of the local rows in it.
        slides: (G,), equal for rows of one slide, in canonical order; None: they do not matter.
    """

    order: Tensor
    own: Tensor
    slides: Tensor | None = None

    @classmethod
    def at(cls, positions_B: Tensor, slides_B: Tensor | None = None) -> Rows:
        """From the local rows' places in the global batch and their slides, int64; one collective."""
        if slides_B is None:
            everywhere_G, slides_G = gather_rows(positions_B), None
        else:
            everywhere_G, slides_G = gather_rows(torch.stack([positions_B, slides_B], dim=1)).unbind(1)
        order_G = torch.argsort(everywhere_G)
        own_B = torch.searchsorted(everywhere_G[order_G], positions_B)
        return cls(order_G, own_B, None if slides_G is None else slides_G[order_G])

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """Local (B, D) rows of several kinds as global (G, D) ones in canonical order, without gradient; one
        collective."""
        rows = gather_rows(torch.cat(parts, dim=1))[self.order]
        return list(torch.split(rows, [part.shape[1] for part in parts], dim=1))


def all_sum(value: Tensor) -> Tensor:
    """The sum over ranks, without gradient; a new tensor."""
    total = value.detach().clone()
    if world()[1] > 1:
        dist.all_reduce(total)
    return total
