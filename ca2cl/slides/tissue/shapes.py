"""Morphology in micrometres, whatever the resolution of a mask.

An operation of less than a pixel is left out. Windows are square: ``scipy.ndimage`` does them in time that does not
grow with their size.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ca2cl.slides.tissue.density import Mask


def grown(mask: Mask, reach: float, mpp: float) -> Mask:
    """``mask`` and all within ``reach`` micrometres of it."""
    return np.asarray(ndimage.maximum_filter(mask, size=window(reach, mpp), mode="constant", cval=False))


def closed(mask: Mask, reach: float, mpp: float) -> Mask:
    """``mask`` with gaps of up to twice ``reach`` micrometres closed; the image's border does not count as a gap."""
    size = window(reach, mpp)
    most = ndimage.maximum_filter(mask, size=size, mode="nearest")
    return np.asarray(ndimage.minimum_filter(most, size=size, mode="nearest"))


def opened(mask: Mask, reach: float, mpp: float) -> Mask:
    """``mask`` without what is thinner than twice ``reach`` micrometres; the image's border is no edge."""
    size = window(reach, mpp)
    least = ndimage.minimum_filter(mask, size=size, mode="nearest")
    return np.asarray(ndimage.maximum_filter(least, size=size, mode="nearest"))


def drop_small(mask: Mask, least: float, mpp: float) -> Mask:
    """``mask`` without patches of fewer than ``least`` square micrometres, corners connected."""
    pixels = least / mpp**2
    if pixels <= 1 or not mask.any():
        return mask
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    large = np.bincount(labels.ravel()) >= pixels
    large[0] = False
    return np.asarray(large[labels])


def fill_small(mask: Mask, most: float, mpp: float) -> Mask:
    """``mask`` with its holes of up to ``most`` square micrometres filled."""
    holes = ~mask
    return np.asarray(mask | (holes & ~drop_small(holes, most, mpp)))


def window(reach: float, mpp: float) -> int:
    """Pixels of the window that reaches ``reach`` micrometres to every side."""
    return 2 * round(reach / mpp) + 1
