"""``crop`` recipe: random resized crops for training from scratch.

Flips, quarter turns, colour and H&E-stain jitter, grey and blur.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ca2cl.runtime.device import to_device
from ca2cl.views.ops import colour, geometry
from ca2cl.views.ops.filters import gaussian_weights, symmetric_blur
from ca2cl.views.ops.random import Draws
from ca2cl.views.ops.subset import apply_to

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


class CropRecipe:
    """Both views are drawn from the same distribution, independently.

    Args:
        size: side of the views in pixels.
        scale: smallest and largest share of the tile's area that a view covers.
        strength: multiplies the ranges of colour and stain jitter.
    """

    name = "crop"

    def __init__(self, size: int, *, scale: tuple[float, float] = (0.2, 1.0), strength: float = 1.0) -> None:
        self.size = size
        self.scale = scale
        self.strength = strength

    def strong(self, images: Tensor, draws: Draws) -> Tensor:
        """One view, float32 (B, 3, S, S) in [0, 1], of tiles float32 (B, 3, H, W) in [0, 1]."""
        colours = to_device(self._draw_colours(draws), images.device)
        out = colour.stain_jitter(self._crop(images, draws), colours[:3].T, colours[3:6].T)
        return self._blur(_jitter(out, *colours[6:]), draws)

    weak = strong

    def _crop(self, images: Tensor, draws: Draws) -> Tensor:
        height, width = images.shape[-2:]
        area = draws.uniform("crop.area", *self.scale)
        ratio = torch.exp(draws.uniform("crop.ratio", math.log(_RATIO[0]), math.log(_RATIO[1])))
        # A window that would pass the tile's edge is narrowed to it rather than drawn again: no draw decides another.
        wide = torch.sqrt(area * ratio).clamp(max=1.0)
        high = torch.sqrt(area / ratio).clamp(max=1.0)
        left, top = draws.uniform("crop.left") * (1.0 - wide), draws.uniform("crop.top") * (1.0 - high)
        turn = geometry.dihedral(
            draws.chance("transpose", 0.5), draws.chance("flip.vertical", 0.5), draws.chance("flip.horizontal", 0.5)
        )
        x, y = geometry.affine_grid(turn.then(geometry.crop(left, top, wide, high)), self.size, images.device)
        factors = [1]
        if min(height, width) >= 2 * self.size:
            factors = geometry.reduction(torch.minimum(wide * width, high * height), self.size).tolist()
        return geometry.sample_reduced(images, factors, x, y)

    def _draw_colours(self, draws: Draws) -> Tensor:
        """Gains of the three stains, their biases, brightness, contrast, saturation and hue; float64 (10, B)."""
        stains = ("haematoxylin", "eosin", "residual")
        on = draws.chance("stain", _JITTER_PROBABILITY).double() * self.strength
        gains = [1.0 + on * draws.uniform(f"{name}.gain", -_STAIN_GAIN, _STAIN_GAIN) for name in stains]
        biases = [on * draws.uniform(f"{name}.bias", -_STAIN_BIAS, _STAIN_BIAS) for name in stains]
        jitter = draws.chance("jitter", _JITTER_PROBABILITY).double() * self.strength
        brightness = 1.0 + jitter * draws.uniform("brightness", -_BRIGHTNESS, _BRIGHTNESS)
        contrast = 1.0 + jitter * draws.uniform("contrast", -_CONTRAST, _CONTRAST)
        saturation = 1.0 + jitter * draws.uniform("saturation", -_SATURATION, _SATURATION)
        hue = jitter * draws.uniform("hue", -_HUE_TURNS, _HUE_TURNS)
        coloured = 1.0 - draws.chance("grey", _GREY_PROBABILITY).double()
        factors = [factor.clamp(min=0.0) for factor in (brightness, contrast, saturation)]
        return torch.stack([*gains, *biases, *factors[:2], factors[2] * coloured, hue * coloured])

    def _blur(self, images: Tensor, draws: Draws) -> Tensor:
        scale = self.size / _SIGMA_SIDE
        sigma = draws.uniform("blur.sigma", _SIGMA[0] * scale, _SIGMA[1] * scale)
        radius = math.ceil(3.0 * _SIGMA[1] * scale)
        kernels = gaussian_weights(sigma, torch.full_like(sigma, radius), radius=radius)
        blurred = draws.chance("blur", _BLUR_PROBABILITY)
        apply_to(images, blurred, lambda some, rows: symmetric_blur(some, kernels[rows]))
        return images


def _jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue as one matrix a sample, held in [0, 1]; the others float64 (B,)."""
    linear = colour.Linear.identity(len(images), images.device).scaled(brightness)
    linear = colour.contrast(linear, contrast, images.mean((2, 3)).double())
    linear = linear.then(colour.saturation_matrix(saturation)).then(colour.hue_matrix(hue))
    return linear(images).clamp_(0.0, 1.0)
