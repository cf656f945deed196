"""Median filters (3 x 3, 5 x 5) as min/max networks.

Columns are sorted once for all the windows that share them, then the rows of the sorted columns. In such a table of
n × n numbers, entry (i, j) has (i+1)(j+1) - 1 others that are no larger and (n-i)(n-j) - 1 that are no smaller, so
only the entries about one diagonal can be the median; the median of those few is the median of all.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_SORT_3 = ((0, 1), (1, 2), (0, 1))
_SORT_5 = ((0, 1), (3, 4), (2, 4), (2, 3), (1, 4), (0, 3), (0, 2), (1, 3), (1, 2))
# One step: (take the larger?, source, source, target). Values are numbered, never overwritten.
Step = tuple[bool, int, int, int]


@lru_cache
def merge_sort_network(count: int) -> tuple[tuple[int, int], ...]:
    """Comparators (i, j), i < j, that sort ``count`` values: Batcher's odd-even merge (Knuth 5.2.2 M)."""
    comparators = []
    top = 1 << (count - 1).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while d > 0:
            comparators += [(i, i + d) for i in range(count - d) if i & p == r]
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return tuple(comparators)


@lru_cache
def selection_steps(side: int) -> tuple[tuple[Step, ...], int]:
    """Steps from the side × side values (column by column, each sorted) to their median, and the median's number."""
    steps: list[Step] = []
    fresh = side * side

    def sort(values: list[int], network: tuple[tuple[int, int], ...]) -> None:
        nonlocal fresh
        for i, j in network:
            steps.append((False, values[i], values[j], fresh))
            steps.append((True, values[i], values[j], fresh + 1))
            values[i], values[j] = fresh, fresh + 1
            fresh += 2

    half, candidates = side * side // 2, []
    for i in range(side):
        row = [j * side + i for j in range(side)]
        sort(row, _SORT_3 if side == 3 else _SORT_5)
        candidates += [
            value
            for j, value in enumerate(row)
            if (i + 1) * (j + 1) <= half + 1 and (side - i) * (side - j) <= half + 1
        ]
    sort(candidates, merge_sort_network(len(candidates)))
    median = candidates[len(candidates) // 2]
    needed, kept = {median}, []
    for step in reversed(steps):
        if step[3] in needed:
            kept.append(step)
            needed.update(step[1:3])
    return tuple(reversed(kept)), median


def median_filter(planes: Tensor, side: int) -> Tensor:
    """Median over side × side windows, the edge pixel repeated outwards.

    Args:
        planes: (B, C, H, W), any type with an order.
        side: 3 or 5.
    """
    radius, (height, width) = side // 2, planes.shape[-2:]
    padded = pad_edges(planes, radius)
    column = [padded[..., i : i + height, :] for i in range(side)]
    for i, j in _SORT_3 if side == 3 else _SORT_5:
        column[i], column[j] = torch.minimum(column[i], column[j]), torch.maximum(column[i], column[j])
    values: dict[int, Tensor] = {j * side + i: column[i][..., j : j + width] for j in range(side) for i in range(side)}
    steps, median = selection_steps(side)
    last_use = {source: number for number, step in enumerate(steps) for source in step[1:3]}
    for number, (larger, first, second, target) in enumerate(steps):
        values[target] = (torch.maximum if larger else torch.minimum)(values[first], values[second])
        for source in (first, second):
            if last_use[source] == number:
                del values[source]
    return values[median]


def pad_edges(planes: Tensor, radius: int) -> Tensor:
    """Repeat the border pixels outwards; for integers too, which ``F.pad`` refuses."""
    if planes.is_floating_point():
        return F.pad(planes, (radius,) * 4, mode="replicate")
    height, width = planes.shape[-2:]
    rows = torch.arange(-radius, height + radius, device=planes.device).clamp_(0, height - 1)
    columns = torch.arange(-radius, width + radius, device=planes.device).clamp_(0, width - 1)
    return planes.index_select(-2, rows).index_select(-1, columns)
