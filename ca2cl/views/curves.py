"""Curves of one number, read off fine tables.

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
def _table(curve: Curve, high: float, device: torch.device) -> Tensor:
    at = torch.arange(ENTRIES, dtype=torch.float64) * (high / (ENTRIES - 1))
    return curve(at).float().to(device)


def read_curve(values: Tensor, curve: Curve, high: float = 1.0) -> Tensor:
    """``curve(values)`` by the nearest of 8192 entries; values outside [0, high] read its ends.

    Args:
        values: float32, any shape.
        curve: a module's function of float64 tensors.
        high: where the table ends.
    """
    places = (values * ((ENTRIES - 1) / high)).add_(0.5).clamp_(0.0, ENTRIES - 1.0)
    return _table(curve, high, values.device).index_select(0, places.to(torch.int32).flatten()).view_as(values)
