"""Shrink pictures by area averaging."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image


def area_mean(
    pixels_HWC: npt.NDArray[np.uint8], left: float, top: float, scale: float, width: int, height: int
) -> npt.NDArray[np.uint8]:
    """Means over the boxes of a coarser grid, (height, width, C), rounded to the nearest number.

    Box (i, j) covers ``[left + j scale, left + (j + 1) scale) x [top + i scale, top + (i + 1) scale)`` of the input,
    whose pixel (y, x) is the unit square at (x, y). Pixels that a box covers in part count by that part. At scale 1 and
    whole ``left`` and ``top`` the result is the input.

    Args:
        pixels_HWC: holds every box but for rounding errors.
        left, top: of the first box, in input pixels.
        scale: input pixels to an output pixel.
        width, height: of the output.
    """
    if scale == round(scale) and left == top == 0 and pixels_HWC.shape[2] == 3:  # Pillow's is 20 times as fast
        whole = pixels_HWC[: round(height * scale), : round(width * scale)]
        return np.asarray(Image.fromarray(whole).reduce(round(scale)))
    rows = _sums(pixels_HWC, top, scale, height)
    means = _sums(rows.transpose(1, 0, 2), left, scale, width).transpose(1, 0, 2) / scale**2
    return np.asarray(np.clip(np.rint(means), 0, 255), np.uint8)


def _sums(values_NXC: npt.NDArray[Any], first: float, scale: float, count: int) -> npt.NDArray[np.float64]:
    """Integrals along the first axis over ``count`` steps of ``scale`` from ``first``, (count, X, C): differences of
    the running sum, which is linear within a pixel."""
    length = len(values_NXC)
    edges = np.clip(first + scale * np.arange(count + 1), 0, length)
    whole = np.minimum(edges.astype(np.int64), length - 1)
    part = (edges - whole)[:, None, None]
    running = np.cumsum(values_NXC, axis=0, dtype=np.uint64 if values_NXC.dtype == np.uint8 else np.float64)
    before = np.where((whole > 0)[:, None, None], running[whole - 1], 0).astype(np.float64)
    return np.diff(before + part * values_NXC[whole], axis=0)
