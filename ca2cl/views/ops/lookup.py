"""Interpolate functions of one number from tables.

A table is faster than a power, and it gives a value the same result wherever in a tensor it lies: torch's powers,
logarithms and exponentials round differently in a vector's body and in its tail, so that a sample's view would depend
on its place in the batch and on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

ENTRIES = 8192
Curve = Callable[[Tensor], Tensor]


@lru_cache
def table_of(curve: Curve, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The curve at the middles of 8192 equal parts of [0, 1], and once more for 1 itself.

    Args:
        curve: a module's function of float64 tensors.
        device: where the table lies.
        dtype: of its entries.
    """
    at = (torch.arange(ENTRIES + 1, dtype=torch.float64) + 0.5) / ENTRIES
    return curve(at.clamp(max=1.0)).to(dtype).to(device)


def look_up(table: Tensor, places: Tensor) -> Tensor:
    """The table's entries at the whole part of ``places``, numbers from 0 to less than ENTRIES + 1, any shape."""
    return table.index_select(0, places.to(torch.int32).flatten()).view(places.shape)
