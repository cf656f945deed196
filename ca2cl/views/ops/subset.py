"""Apply an operation to the samples that drew it.

Parameters and masks live on the CPU, where they are drawn: which samples go together is then known without waiting
for the device, and the parameters are the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ca2cl.runtime.device import to_device


def rows_of(mask: Tensor) -> Tensor:
    """Numbers of the samples where a bool (B,) mask on the CPU is set, int64 ascending."""
    return torch.nonzero(mask).flatten()


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One number a sample, (B,) → float32 (B, 1, …, 1) on the device of ``like`` with as many dimensions."""
    return to_device(values.float(), like.device).view(-1, *[1] * (like.ndim - 1))


def apply_to(images: Tensor, mask: Tensor, operation: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the images where ``mask`` is set by ``operation(those images, their rows)``; the others are not touched.

    Args:
        images: (B, …), changed in place.
        mask: bool (B,) on the CPU.
        operation: is given images that it may change; their rows (CPU) pick its parameters.
    """
    rows = rows_of(mask)
    if len(rows) == 0:
        return
    if len(rows) == len(images):
        result = operation(images, rows)
        if result is not images:
            images.copy_(result)
        return
    here = to_device(rows, images.device)
    images.index_copy_(0, here, operation(images.index_select(0, here), rows))
