"""Optical density of a slide's overview, relative to its glass.

Legend: H, W pixels of the overview. Densities are float16, whose steps of 0.0005 are far below a pixel's noise: a
slide's overview may have 16 million pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]
Density = npt.NDArray[np.float16]

_BRIGHT = 200
"""Glass is brighter than this in every channel."""
_COLOURLESS = 25
"""Greatest difference between a glass pixel's channels."""
_LEAST_GLASS = 0.005
"""Share of the overview below which glass is a chance find, such as a few gaps in dense tissue."""
_GLASS_QUANTILE = 0.75
_USUAL_GLASS = (243.0, 243.0, 243.0)


@dataclass(frozen=True)
class Stain:
    """Optical density -log10(I / I0) of red, green and blue light, each (H, W); not negative."""

    red: Density
    green: Density
    blue: Density

    @property
    def mean(self) -> Density:
        """The density D of the hue-saturation-density model (van der Laak et al., Cytometry 39, 2000)."""
        return np.asarray((self.red + self.green + self.blue) / np.float16(3))

    @property
    def chroma(self) -> Density:
        """Largest less smallest density: 0 for grey, however dark; it grows with the amount of a coloured stain."""
        high = np.maximum(np.maximum(self.red, self.green), self.blue)
        return np.asarray(high - np.minimum(np.minimum(self.red, self.green), self.blue))


def stain_of(rgb_HWC: Pixels) -> Stain:
    """Optical density of an RGB image, with the image's own glass as the light without stain."""
    planes = [_table(white)[rgb_HWC[..., channel]] for channel, white in enumerate(glass_colour(rgb_HWC))]
    return Stain(*planes)


def _table(white: float) -> Density:
    """Density of each of the 256 intensities. 0 counts as 1, so the largest is 2.4."""
    intensity = np.maximum(np.arange(256, dtype=np.float64), 1)
    return np.maximum(np.log10(white / intensity), 0).astype(np.float16)


def glass_colour(rgb_HWC: Pixels) -> tuple[float, ...]:
    """Colour of the empty glass: bright and colourless, but not the pure white outside of the scanned region.

    Of each channel its upper quartile, since pale tissue may be bright and colourless too. A usual scanner's glass
    where there is none, such as in an image that is all tissue.
    """
    low, high = rgb_HWC.min(axis=-1), rgb_HWC.max(axis=-1)
    glass = (low >= _BRIGHT) & (high - low <= _COLOURLESS) & (low < 255)
    if np.count_nonzero(glass) < _LEAST_GLASS * glass.size:
        return _USUAL_GLASS
    return tuple(_quantile(rgb_HWC[..., channel][glass]) for channel in range(3))


def _quantile(values: npt.NDArray[Any]) -> float:
    counts = np.bincount(values, minlength=256).cumsum()
    return float(np.searchsorted(counts, _GLASS_QUANTILE * counts[-1]))
