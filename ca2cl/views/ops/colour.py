"""Point-wise colour operations, folded into one matrix a sample.

Images are float32 (B, 3, H, W) in [0, 1]; a linear operation is a ``Linear``: matrix and offset of every sample. All
tensors lie on one device: a recipe moves what it has drawn to that of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ca2cl.views.ops.lookup import ENTRIES, look_up, table_of

LUMA = (0.299, 0.587, 0.114)
# Optical density of haematoxylin, eosin and a residual (Ruifrok and Johnston, 2001), unit length, one stain a row.
STAINS = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
_YIQ = (LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
_DARKEST = 1.0 / 255.0
_DENSEST = 8.0


@lru_cache
def _constant(rows: tuple[tuple[float, ...], ...], device: torch.device, inverse: bool = False) -> Tensor:
    matrix = torch.tensor(rows, dtype=torch.float64)
    return (torch.linalg.inv(matrix) if inverse else matrix).to(device)


@dataclass(frozen=True)
class Linear:
    """rgb' = matrix · rgb + offset; matrix float64 (B, 3, 3), offset float64 (B, 3)."""

    matrix: Tensor
    offset: Tensor

    @classmethod
    def identity(cls, count: int, device: torch.device) -> Linear:
        """The map that changes nothing."""
        eye = torch.eye(3, dtype=torch.float64, device=device).expand(count, 3, 3)
        return cls(eye, torch.zeros(count, 3, dtype=torch.float64, device=device))

    def then(self, matrix: Tensor, offset: Tensor | None = None) -> Linear:
        """This map first, then ``matrix`` (and ``offset``)."""
        moved = product(matrix, self.offset[:, :, None])[:, :, 0]
        return Linear(product(matrix, self.matrix), moved if offset is None else moved + offset)

    def scaled(self, factor: Tensor) -> Linear:
        """This map, then a factor (B,)."""
        return Linear(self.matrix * factor[:, None, None], self.offset * factor[:, None])

    def __call__(self, images: Tensor) -> Tensor:
        """The images through this map, not clamped."""
        flat = images.flatten(2)
        out = torch.baddbmm(self.offset.float()[:, :, None], self.matrix.float(), flat)
        return out.view_as(images)


def product(left: Tensor, right: Tensor) -> Tensor:
    """Batched product of small matrices, summed in a fixed order: BLAS picks a kernel by batch size."""
    terms = left[..., :, :, None] * right[..., None, :, :]
    return terms[..., 0, :] + terms[..., 1, :] + terms[..., 2, :]


def _diagonal(values: Tensor) -> Tensor:
    return torch.diag_embed(values)


def contrast(linear: Linear, factor: Tensor, mean_rgb: Tensor) -> Linear:
    """Spread about the mean grey of the image as ``linear`` has made it: c x + (1 - c) mean.

    Args:
        linear: what comes before.
        factor: float64 (B,).
        mean_rgb: mean of the channels of the image that ``linear`` is given, float64 (B, 3).
    """
    luma = _constant((LUMA,), factor.device)[0]
    now = product(linear.matrix, mean_rgb[:, :, None])[:, :, 0] + linear.offset
    weighted = now * luma
    grey = weighted[:, 0] + weighted[:, 1] + weighted[:, 2]
    scaled = linear.scaled(factor)
    return Linear(scaled.matrix, scaled.offset + ((1.0 - factor) * grey)[:, None])


def saturation_matrix(factor: Tensor) -> Tensor:
    """Blend with the own grey: factor 0 is grey, 1 changes nothing. (B,) → (B, 3, 3)."""
    luma = _constant((LUMA,), factor.device).expand(3, 3)
    return _diagonal(factor[:, None].expand(-1, 3)) + (1.0 - factor)[:, None, None] * luma


def hue_matrix(turns: Tensor) -> Tensor:
    """Turn the chroma plane of YIQ, luma unchanged. (B,) in turns → (B, 3, 3)."""
    angle = turns * (2.0 * math.pi)
    cos, sin, one, zero = torch.cos(angle), torch.sin(angle), torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.stack((one, zero, zero, zero, cos, -sin, zero, sin, cos), dim=-1).view(-1, 3, 3)
    device = turns.device
    inverse, forward = _constant(_YIQ, device, True), _constant(_YIQ, device)
    return product(product(inverse.expand_as(turn), turn), forward.expand_as(turn))


def stain_map(gain: Tensor, bias: Tensor) -> Linear:
    """A change of stain concentrations, c' = gain c + bias, as a map of optical densities.

    Args:
        gain: float64 (B, 3) for haematoxylin, eosin and the residual.
        bias: the same.
    """
    device = gain.device
    stains = _constant(STAINS, device).T.expand(len(gain), 3, 3)
    unmix = _constant(STAINS, device, True).T.expand(len(gain), 3, 3)
    matrix = product(product(stains, _diagonal(gain)), unmix)
    return Linear(matrix, product(stains, bias[:, :, None])[:, :, 0])


def stain_jitter(images: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Perturbed concentrations of the stains (Tellez et al., 2019), by Beer and Lambert's law: I = exp(-density)."""
    density = look_up(table_of(_density, images.device), images * ENTRIES)
    places = stain_map(gain, bias).scaled(torch.full_like(gain[:, 0], ENTRIES / _DENSEST))(density)
    return look_up(table_of(_transmission, images.device), places.clamp_(0.0, ENTRIES))


def _density(intensity: Tensor) -> Tensor:
    return -torch.log(intensity.clamp(min=_DARKEST))


def _transmission(density: Tensor) -> Tensor:
    """Of a density in units of the densest."""
    return torch.exp(-density * _DENSEST)
