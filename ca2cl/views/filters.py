"""Neighbourhood operations, batched over just the samples that drew them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gaussian_blur(images: Tensor, sigma: Tensor, *, radius: int) -> Tensor:
    """Gaussian blur with its own width for every sample, reflecting at the border (the edge pixel not repeated).

    Args:
        images: float32 (B, C, H, W).
        sigma: float64 (B,), standard deviation in pixels, positive.
        radius: taps on either side of the centre; the kernel has 2 radius + 1, normalised to sum 1.
    """
    taps = torch.arange(radius + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (taps / sigma[:, None]) ** 2)
    weights = weights / (2.0 * weights.sum(1, keepdim=True) - weights[:, :1])
    return symmetric_blur(images, weights.float())


def symmetric_blur(images: Tensor, weights: Tensor) -> Tensor:
    """A separable blur by a kernel that is the same to both sides.

    Args:
        images: float32 (B, C, H, W).
        weights: float32 (B, radius + 1), from the centre outwards.
    """
    radius = weights.shape[1] - 1
    for dim in (2, 3):
        margins = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded, size = F.pad(images, margins, mode="reflect"), images.shape[dim]
        # A chain of shifted sums, not a grouped convolution: the same for every batch size, and as fast on few taps.
        images = images * weights[:, 0, None, None, None]
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, size) + padded.narrow(dim, radius + tap, size)
            images.add_(pair.mul_(weights[:, tap, None, None, None]))
    return images
