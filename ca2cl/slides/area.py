"""Area averaging: pixels of a finer grid to pixels of a coarser one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
    rows = _sums(pixels_HWC, top + scale * np.arange(height + 1))
    both = _sums(rows.transpose(1, 0, 2), left + scale * np.arange(width + 1)).transpose(1, 0, 2)
    return np.clip(np.rint(both / scale**2), 0, 255).astype(np.uint8)


def _sums(values_NXC: npt.NDArray[np.generic], edges_K: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Integrals along the first axis between consecutive edges, (K - 1, X, C): differences of the running sum, which
    is linear within a pixel."""
    count = len(values_NXC)
    edges = np.clip(edges_K, 0, count)
    whole = np.minimum(edges.astype(np.int64), count - 1)
    part = (edges - whole)[:, None, None]
    kind = np.uint64 if values_NXC.dtype.kind == "u" else np.float64
    running = np.cumsum(values_NXC, axis=0, dtype=kind)
    before = np.where((whole > 0)[:, None, None], running[whole - 1], 0).astype(np.float64)
    integral = before + part * values_NXC[whole]
    return np.diff(integral, axis=0)
