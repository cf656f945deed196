"""Shrink pictures by area averaging."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import sparse


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
    if scale == round(scale) and left == top == 0 and pixels_HWC.shape[2] == 3:  # Pillow's is 5 times as fast
        whole = pixels_HWC[: round(height * scale), : round(width * scale)]
        return np.asarray(Image.fromarray(whole).reduce(round(scale)))
    rows, columns, channels = pixels_HWC.shape
    rows_IH, columns_JW = _weights(top, scale, height, rows, 1), _weights(left, scale, width, columns, channels)
    wide_IW = rows_IH @ pixels_HWC.reshape(rows, -1).astype(np.float32)
    means_JI = columns_JW @ np.ascontiguousarray(wide_IW.T)
    np.rint(means_JI, out=means_JI)
    return np.ascontiguousarray(means_JI.astype(np.uint8).T).reshape(height, width, channels)


@lru_cache(maxsize=64)
def _weights(first: float, scale: float, count: int, length: int, channels: int) -> Any:
    """Shares of the input pixels in each of ``count`` steps of ``scale`` from ``first``, sparse (count * channels,
    length * channels)."""
    edges = np.clip(first + scale * np.arange(count + 1), 0, length)
    starts = np.minimum(edges[:-1].astype(np.int64), length - 1)
    reach = int((np.ceil(edges[1:]) - starts).max())
    places = starts[:, None] + np.arange(max(reach, 1))
    share = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
    step, tap = np.nonzero((share > 0) & (places < length))
    shares = (share[step, tap] / scale).astype(np.float32)
    weights = sparse.csr_array((shares, (step, places[step, tap])), shape=(count, length))
    return sparse.csr_array(sparse.kron(weights, sparse.eye_array(channels, dtype=np.float32), format="csr"))
