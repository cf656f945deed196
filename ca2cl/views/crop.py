"""``crop`` recipe: random resized crops for training from scratch.

Flips, quarter turns, colour and H&E-stain jitter, grey and blur.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ca2cl.views.draw import maps
from ca2cl.views.draw.random import Draws, Floats
from ca2cl.views.draw.table import GAUSSIAN, Passes, Table, View, plain

_RATIO = (3.0 / 4.0, 4.0 / 3.0)
_JITTER_PROBABILITY = 0.8
_BRIGHTNESS = _CONTRAST = 0.4
_SATURATION = 0.2
_HUE_TURNS = 0.05
_STAIN_GAIN, _STAIN_BIAS = 0.25, 0.05
_GREY_PROBABILITY = 0.2
_BLUR_PROBABILITY = 0.5
# Of a 224-pixel view, as SimCLR (Chen et al., 2020) has it; smaller views are blurred less in proportion.
_SIGMA, _SIGMA_SIDE = (0.1, 2.0), 224

LUMA = np.array((0.299, 0.587, 0.114))
# Optical density of haematoxylin, eosin and a residual (Ruifrok and Johnston, 2001), unit length, one stain a row.
STAINS = np.array(((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776)))
_STAIN_NAMES = ("haematoxylin", "eosin", "residual")
_YIQ = np.array((LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)))


class CropRecipe:
    """Both views are drawn from the same distribution, independently.

    Args:
        size: side of the views in pixels.
        scale: smallest and largest share of the tile's area that a view covers.
        strength: multiplies the ranges of colour and stain jitter.
    """

    name = "crop"
    draw_names = (
        "crop.area", "crop.ratio", "crop.left", "crop.top", "transpose", "flip.vertical", "flip.horizontal", "stain",
        *(f"{stain}.{part}" for stain in ("haematoxylin", "eosin", "residual") for part in ("gain", "bias")),
        "jitter", "brightness", "contrast", "saturation", "hue", "grey", "blur", "blur.sigma",
    )  # fmt: skip

    def __init__(self, size: int, *, scale: tuple[float, float] = (0.2, 1.0), strength: float = 1.0) -> None:
        self.size = size
        self.scale = scale
        self.strength = strength

    def passes(self, view: View) -> Passes:
        """What some tile of a view may draw: the same for both views."""
        return Passes(stain=True, blur=True, clahe=False)

    def draw(self, draws: Draws, views: Sequence[View], tile_sides: tuple[int, int]) -> Table:
        """The rows of some views, (V, B); their tiles are of (height, width) pixels."""
        area = draws.uniform("crop.area", *self.scale)
        ratio = np.exp(draws.uniform("crop.ratio", math.log(_RATIO[0]), math.log(_RATIO[1])))
        # A window that would pass the tile's edge is narrowed to it rather than drawn again: no draw decides another.
        wide, high = np.minimum(np.sqrt(area * ratio), 1.0), np.minimum(np.sqrt(area / ratio), 1.0)
        left, top = draws.uniform("crop.left") * (1.0 - wide), draws.uniform("crop.top") * (1.0 - high)
        flips = maps.dihedral(*(draws.chance(name, 0.5) for name in ("transpose", "flip.vertical", "flip.horizontal")))
        table = plain(*area.shape)
        table["affine"] = maps.then(flips, maps.window(left, top, wide, high))
        # Reading every other pixel does not alias; a window of more is averaged over blocks first.
        height, width = tile_sides
        table["reduce"] = np.maximum(np.floor(np.minimum(wide * width, high * height) / self.size), 1.0)
        self._draw_stains(draws, table)
        self._draw_colours(draws, table)
        scale = self.size / _SIGMA_SIDE
        table["blur"] = GAUSSIAN * draws.chance("blur", _BLUR_PROBABILITY)
        table["sigma"] = draws.uniform("blur.sigma", _SIGMA[0] * scale, _SIGMA[1] * scale)
        table["radius"] = math.ceil(3.0 * _SIGMA[1] * scale)
        return table

    def _draw_stains(self, draws: Draws, table: Table) -> None:
        """Perturbed concentrations of the stains, c' = gain c + bias (Tellez et al., 2019), as maps of densities."""
        on = table["stained"] = draws.chance("stain", _JITTER_PROBABILITY)
        reach = self.strength * on
        matrix, offset = np.zeros((*on.shape, 9)), np.zeros((*on.shape, 3))
        for stain, density, unmix in zip(_STAIN_NAMES, STAINS, np.linalg.inv(STAINS.T), strict=True):
            gain = 1.0 + reach * draws.uniform(f"{stain}.gain", -_STAIN_GAIN, _STAIN_GAIN)
            bias = reach * draws.uniform(f"{stain}.bias", -_STAIN_BIAS, _STAIN_BIAS)
            matrix = matrix + gain[..., None] * np.outer(density, unmix).reshape(9)
            offset = offset + bias[..., None] * density
        table["stain"] = np.concatenate((matrix, offset), -1)

    def _draw_colours(self, draws: Draws, table: Table) -> None:
        """Brightness, contrast about the mean grey, saturation and hue as one matrix. The last two leave grey."""
        jitter = self.strength * draws.chance("jitter", _JITTER_PROBABILITY)
        brightness, contrast, saturation = (
            np.maximum(1.0 + jitter * draws.uniform(name, -reach, reach), 0.0)
            for name, reach in (("brightness", _BRIGHTNESS), ("contrast", _CONTRAST), ("saturation", _SATURATION))
        )
        coloured = ~draws.chance("grey", _GREY_PROBABILITY)
        matrix = saturate(
            saturation * coloured, turn_hue(coloured * jitter * draws.uniform("hue", -_HUE_TURNS, _HUE_TURNS))
        )
        table["coloured"] = 1
        table["colour"][..., :9] = (brightness * contrast)[..., None] * matrix
        table["colour"][..., 9] = brightness * (1.0 - contrast)


def turn_hue(turns: Floats) -> Floats:
    """The matrix (..., 9) that turns the chroma plane of YIQ, luma unchanged."""
    luma, i, q = np.linalg.inv(_YIQ).T
    _, by_i, by_q = _YIQ
    along = (np.outer(i, by_i) + np.outer(q, by_q)).reshape(9)
    across = (np.outer(q, by_i) - np.outer(i, by_q)).reshape(9)
    angle = turns[..., None] * (2.0 * math.pi)
    matrix: Floats = np.outer(luma, LUMA).reshape(9) + np.cos(angle) * along + np.sin(angle) * across
    return matrix


def saturate(factor: Floats, matrix: Floats) -> Floats:
    """A matrix (..., 9) that keeps luma, blended with the own grey: factor 0 is grey, 1 changes nothing."""
    grey = np.tile(LUMA, 3)
    blended: Floats = grey + factor[..., None] * (matrix - grey)
    return blended
