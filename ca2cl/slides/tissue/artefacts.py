"""Pen marks, black and folds on the overview of a slide.

Thresholds are optical densities of pixels of about 7 micrometres, set by real tissue: docs/slides.md has the numbers.
Every rule asks for a patch of some size, so that one dark nucleus or red blood cell is none.

Legend: H, W pixels of the overview.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ca2cl.slides.tissue.density import Density, Mask, Stain
from ca2cl.slides.tissue.shapes import drop_small, grown, window

_LEAST_PATCH = 1000.0
"""Square micrometres: a spot of 36 micrometres."""
_INK_REACH, _BLACK_REACH = 150.0, 50.0
"""Micrometres from an artefact's core to the end of its rim."""
_COLD, _LEAST_COLD = 1.3, 0.1
"""Green ink: red density against green, as a ratio and a difference. Haematoxylin's ratio is 0.8 to 1."""
_BLUE, _LEAST_BLUE = 1.05, 0.35
"""Blue ink: red density against green as a ratio, and against blue as a difference."""
_RED_INK, _RED_BLUE, _RED_RATIO = 0.6, 0.6, 0.3
"""Red ink: green density, and blue and red against it. Of eosin and blood 1 pixel in 7,000 is like it."""
_RIM, _RIM_BLUE, _RIM_RATIO = 0.2, 0.5, 0.45
"""The same of its rim."""
_DARK = 0.6
"""Density of more ink beside ink: 1 % of the pixels of real tissue are as dense."""
_FILM, _SMOOTH = 0.02, 0.06
"""Least density of a blurred rim, and its greatest relative difference to the pixels around."""
_BLACK, _GREY, _OPAQUE, _BLACK_RIM = 0.5, 0.35, 1.1, 0.3
"""Density of black, its greatest chroma as a share of that; density that is black in any colour; the rim's density."""
_FOLD_NEAR, _FOLD_AROUND = 50.0, 700.0
"""Micrometres: the width of a fold at least, and of its surroundings."""
_FOLD_FACTOR, _FOLD_DENSITY, _FOLD_FLOOR = 1.6, 0.35, 0.03
"""Stain against the surroundings, which contain the fold: 2 is out of reach. Least density; least usual stain."""
_LEAST_FOLD = 10_000.0
"""Square micrometres of the middle of a fold: a cluster of dark glands has less."""
_FOLD_PIXEL = 15.0
"""Micrometres of the pixels that are compared; finer ones show nuclei."""


def pen_marks(stain: Stain, density: Density, mpp: float) -> Mask:
    """Green, blue and red ink, bool (H, W).

    Green and blue ink absorb red light above all, which neither haematoxylin nor eosin does. Red ink has the hue of
    eosin and blood, but is denser. Around it, whatever is reddish counts as its pale rim, and whatever is dark as
    more ink.
    """
    red, green, blue = stain.red, stain.green, stain.blue
    cold = (red > np.float16(_COLD) * green) & (red - green > np.float16(_LEAST_COLD))
    cold |= (red > np.float16(_BLUE) * green) & (red - blue > np.float16(_LEAST_BLUE))
    warm = _reddish(stain, _RED_INK, _RED_BLUE, _RED_RATIO)
    core = drop_small(cold | warm, _LEAST_PATCH, mpp)
    if not core.any():
        return core
    rim = _reddish(stain, _RIM, _RIM_BLUE, _RIM_RATIO) | cold | (density > np.float16(_DARK)) | _smooth(density)
    return _reached(core, rim, _INK_REACH, mpp)


def _reddish(stain: Stain, green: float, blue: float, red: float) -> Mask:
    """Green density above ``green``; blue density above, and red density below, these shares of it."""
    found = (stain.green > np.float16(green)) & (stain.blue > np.float16(blue) * stain.green)
    return np.asarray(found & (stain.red < np.float16(red) * stain.green))


def _smooth(density: Density) -> Mask:
    """Not glass, and as dense as the mean of the pixels around: out of focus, as ink on the cover glass is."""
    exact = density.astype(np.float32)
    near = ndimage.uniform_filter(exact, 3, mode="nearest")
    return np.asarray((exact > _FILM) & (np.abs(exact - near) < _SMOOTH * near))


def black_marks(density: Density, chroma: Density, mpp: float) -> Mask:
    """Dark without colour, or nearly opaque, bool (H, W): black ink, dust, pencil, the scanner's border."""
    core = (density > np.float16(_BLACK)) & (chroma < np.float16(_GREY) * density)
    core |= density > np.float16(_OPAQUE)
    core = drop_small(core, _LEAST_PATCH, mpp)
    if not core.any():
        return core
    return _reached(core, density > np.float16(_BLACK_RIM), _BLACK_REACH, mpp)


def folds(stain: Stain, density: Density, tissue: Mask, mpp: float) -> Mask:
    """Tissue that lies double, bool (H, W): both of its stains have far more density than around.

    Bautista and Yagi (2009) and Kothari et al. (2013) threshold the difference of saturation and intensity of the
    slide, which dense nuclei pass too. In a fold both stains double. Haematoxylin alone absorbs red light, and eosin
    has most of the difference of green and red, which lymphocytes have less of than their surroundings.
    """
    step = max(int(_FOLD_PIXEL / mpp), 1)
    coarse = mpp * step
    count = _shrunk(tissue, step)
    near, around = _mean(count, _FOLD_NEAR, coarse), _mean(count, _FOLD_AROUND, coarse)
    dense = _mean(_shrunk(np.where(tissue, density, 0), step), _FOLD_NEAR, coarse)
    double = (dense > _FOLD_DENSITY * near) & (count > 0)
    for plane in (stain.red, stain.green - stain.red):
        part = _shrunk(np.where(tissue, plane, 0), step)
        usual = np.maximum(_mean(part, _FOLD_AROUND, coarse), _FOLD_FLOOR * around)
        double &= _mean(part, _FOLD_NEAR, coarse) * around > _FOLD_FACTOR * usual * near
    # The mean of a square is high only in the middle of a fold.
    double = grown(drop_small(double, _LEAST_FOLD, coarse), _FOLD_NEAR / 2, coarse)
    double = double.repeat(step, axis=0).repeat(step, axis=1)
    return np.asarray(double[: tissue.shape[0], : tissue.shape[1]] & tissue)


def _shrunk(plane: npt.NDArray[Any], step: int) -> npt.NDArray[np.float32]:
    """Mean of blocks of ``step`` x ``step`` pixels, with zeros beyond the right and lower edge."""
    padded = np.pad(plane, [(0, -side % step) for side in plane.shape])
    height, width = padded.shape
    blocks = padded.reshape(height // step, step, width // step, step)
    return np.asarray(blocks.mean(axis=(1, 3), dtype=np.float32))


def _mean(plane: npt.NDArray[np.float32], side: float, mpp: float) -> npt.NDArray[np.float32]:
    """Mean over a square of ``side`` micrometres around each pixel."""
    return np.asarray(ndimage.uniform_filter(plane, window(side / 2, mpp), mode="nearest"))


def _reached(core: Mask, rim: Mask, reach: float, mpp: float) -> Mask:
    """``core`` and what of ``rim`` is connected with it within ``reach`` micrometres."""
    near = grown(core, reach, mpp)
    return np.asarray(ndimage.binary_propagation(core, mask=core | (near & rim)))
