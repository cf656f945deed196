"""Sharpness of a tile: its fine detail relative to its coarse detail.

Legend: H, W pixels of a tile.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ca2cl.slides.tissue.density import Pixels

LEAST_SHARPNESS = 0.13
"""Sharp tiles of real tissue have 0.23 or more; blurred by a Gaussian of 2 micrometres they have 0.12 or less."""
_GREEN = 1
_MPP = 1.0
"""Micrometres a pixel that sharpness is measured at, if the tile is that fine."""
_FINE, _COARSE = 1, 4
_LEAST_SIDE = 16
_ROUNDING = 0.2
"""Mean absolute Laplacian of what rounding and JPEG do to a smooth image, in intensity levels."""
_FLAT = 1.0
"""Coarse detail in intensity levels below which there is nothing that could be blurred."""


def sharpness(tile_HWC: Pixels, mpp: float) -> float:
    """Ratio of a tile's mean absolute Laplacians at distances of 1 and 4 micrometres, from 0 (blurred) to about 1.

    The energy of the Laplacian is a usual measure of focus (Pertuz et al., Pattern Recognition 46, 2013), but it grows
    with contrast, so that a threshold rejects pale tissue. The ratio does not depend on contrast. A blur that is wider
    than both distances leaves a parabola, and 1/16.

    Infinite for a tile without detail, such as empty glass. At more than 1 micrometre a pixel, the distances are 1 and
    4 pixels: a blur of a micrometre or two cannot be seen there.

    Args:
        tile_HWC: RGB, of at least 16 pixels a side.
        mpp: its micrometres a pixel.
    """
    most = min(tile_HWC.shape[:2]) // _LEAST_SIDE
    green_HW = _shrunk(tile_HWC[..., _GREEN], max(min(round(_MPP / mpp), most), 1))
    coarse = _laplacian(green_HW, _COARSE)
    if coarse < _FLAT:
        return float("inf")
    return max(_laplacian(green_HW, _FINE) - _ROUNDING, 0.0) / coarse


def is_sharp(tile_HWC: Pixels, mpp: float, least: float | None = None) -> bool:
    """True if a tile's sharpness is ``least`` or more; None takes ``LEAST_SHARPNESS``, 0 any tile."""
    least = LEAST_SHARPNESS if least is None else least
    return least <= 0 or sharpness(tile_HWC, mpp) >= least


def _shrunk(image_HW: Pixels, step: int) -> npt.NDArray[np.float32]:
    """Mean of blocks of ``step`` x ``step`` pixels. Slices are ten times as fast as ``mean`` over short axes."""
    height, width = (side // step * step for side in image_HW.shape)
    total = np.zeros((height // step, width // step), np.float32)
    for row in range(step):
        for column in range(step):
            total += image_HW[row:height:step, column:width:step]
    total /= step * step
    return total


def _laplacian(image_HW: npt.NDArray[np.float32], distance: int) -> float:
    """Mean absolute difference between a pixel and the mean of its four neighbours at ``distance``."""
    inner = slice(distance, -distance)
    around = image_HW[: -2 * distance, inner] + image_HW[2 * distance :, inner]
    around += image_HW[inner, : -2 * distance]
    around += image_HW[inner, 2 * distance :]
    around *= 0.25
    around -= image_HW[inner, inner]
    return float(np.abs(around, out=around).mean())
