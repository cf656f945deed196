"""Blur and noise filters, batched over the samples that drew them."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.runtime.device import to_device
from ca2cl.views.ops.median import median_filter
from ca2cl.views.ops.random import Draws
from ca2cl.views.ops.subset import per_sample, rows_of


def gaussian_weights(sigma: Tensor, taps: Tensor, *, radius: int) -> Tensor:
    """Gaussian kernels from the centre outwards, for ``symmetric_blur``.

    Args:
        sigma: (B,), standard deviation in pixels, positive.
        taps: int (B,), how many taps on either side are not zero.
        radius: how many taps on either side there are.

    Returns:
        float64 (B, radius + 1); a whole kernel, of both sides, sums to 1.
    """
    at = torch.arange(radius + 1, dtype=torch.float64)
    weights = torch.exp(-0.5 * (at / sigma.double()[:, None]) ** 2) * (at <= taps[:, None])
    return weights / (2.0 * weights.sum(1, keepdim=True) - weights[:, :1])


def symmetric_blur(images: Tensor, weights: Tensor) -> Tensor:
    """A separable blur by a kernel that is the same to both sides, reflecting at the border (its pixel not repeated).

    Args:
        images: float32 (B, C, H, W).
        weights: (B, radius + 1), from the centre outwards.
    """
    radius = weights.shape[1] - 1
    for dim in (2, 3):
        margins = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded, size = F.pad(images, margins, mode="reflect"), images.shape[dim]
        # A chain of shifted sums, not a grouped convolution: the same for every batch size, and as fast on few taps.
        images = images * per_sample(weights[:, 0], images)
        for tap in range(1, radius + 1):
            pair = padded.narrow(dim, radius - tap, size) + padded.narrow(dim, radius + tap, size)
            images.add_(pair.mul_(per_sample(weights[:, tap], images)))
    return images


@lru_cache
def motion_lines() -> tuple[tuple[tuple[int, int], ...], ...]:
    """Straight lines of pixels (y, x) through the centre: the 4 directions of 3 pixels, then the 8 of 5 pixels."""
    lines = []
    for radius in (1, 2):
        for y, x in product(range(radius + 1), range(-radius, radius + 1)):
            if max(y, abs(x)) == radius and (y > 0 or x > 0):
                steps = range(-radius, radius + 1)
                lines.append(tuple((_nearest(y * t / radius), _nearest(x * t / radius)) for t in steps))
    return tuple(lines)


def _nearest(number: float) -> int:
    """Halves away from zero, so that a line's two ends mirror each other."""
    return int(math.copysign(math.floor(abs(number) + 0.5), number))


def motion_blur(images: Tensor, line: Tensor) -> Tensor:
    """Mean along a line of pixels, reflecting at the border.

    Args:
        images: float32 (B, C, H, W).
        line: int64 (B,) on the CPU, numbers of lines in ``motion_lines``.
    """
    height, width = images.shape[-2:]
    out = torch.empty_like(images)
    for number in sorted(set(line.tolist())):
        rows = to_device(rows_of(line == number), images.device)
        taps, radius = motion_lines()[number], 1 if number < 4 else 2
        padded = F.pad(images.index_select(0, rows), (radius,) * 4, mode="reflect")
        total = torch.zeros_like(padded[..., :height, :width])
        for y, x in taps:
            total.add_(padded[..., radius + y : radius + y + height, radius + x : radius + x + width])
        out.index_copy_(0, rows, total.mul_(1.0 / len(taps)))
    return out


def median_blur(images: Tensor, side: int) -> Tensor:
    """Median over side × side windows of the images as 8-bit ones (four times as fast as on floats).

    Args:
        images: float32 (B, C, H, W) in [0, 1].
        side: 3 or 5.
    """
    levels = (images * 255.0).round_().to(torch.uint8)
    return median_filter(levels, side).float().mul_(1.0 / 255.0)


@lru_cache
def normal_table(length: int, device: torch.device) -> Tensor:
    """``length`` normal numbers, float32, the same ones in every run."""
    uniform = Draws(torch.arange(length), seed=0, epoch=0, view="table").uniform("normal")
    # Half a step of the 53-bit lattice keeps the smallest uniform number off zero.
    normal: Tensor = torch.special.ndtri(uniform + 2.0**-54)
    return normal.float().to(device)


def add_noise(images: Tensor, deviation: Tensor, words: Tensor) -> Tensor:
    """Add Gaussian noise, held in [0, 1].

    A sample's noise is a window of one fixed table, at a place that its own word says: to draw it afresh costs more
    than the rest of the view. Windows of two samples may overlap, shifted; pixels of one sample never repeat.

    Args:
        images: float32 (B, C, H, W), changed in place.
        deviation: float64 (B,).
        words: int64 (B,) on the CPU.
    """
    size = images[0].numel()
    table = normal_table(max(1 << 20, 1 << (4 * size - 1).bit_length()), images.device)
    windows = table.unfold(0, size, 1)
    noise = windows.index_select(0, to_device(words.remainder(len(windows)), images.device)).view_as(images)
    return images.add_(noise.mul_(per_sample(deviation, images))).clamp_(0.0, 1.0)
