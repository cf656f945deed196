"""Small grey pictures of tiles, and descriptors made of them.

A thumbnail keeps the structure of a tile and drops what a copy changes: colour, contrast, compression. A descriptor is
the low-frequency part of its discrete cosine transform. Flips and quarter turns of a tile only change signs of the
coefficients and transpose them, so all eight are compared without another look at the pixels.

Legend: B tiles, H, W height and width in pixels, S side of a thumbnail, K coefficients of each axis, D = K² - 1.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Floats = npt.NDArray[np.float32]
SIDE = 56
"""S. A pixel of a thumbnail is 4 pixels of a tile of 224."""
ORIENTATIONS = 8
"""Flips and quarter turns of a square. Bit 0: columns are mirrored; bit 1: rows; bit 2: transposed, after these."""
STEP = SIDE // 28
"""Shift between windows of a thumbnail: 8 pixels of a tile of 224."""
OFFSETS = tuple((row * STEP, column * STEP) for row in (0, -1, 1) for column in (0, -1, 1))
"""Places of the windows that a shifted tile is looked for in; the first is the centre."""
_LEVELS_A_DEVIATION = 32.0
_FLAT = 3.0
"""Grey levels: a tile whose thumbnail has a smaller standard deviation has no structure to know it by."""


def thumbnails(tiles_BHWC: Tensor) -> Tensor:
    """Grey thumbnails uint8 (B, S, S), of mean 128 and 32 levels a standard deviation; a flat tile's is 128 all over.

    Args:
        tiles_BHWC: uint8 tiles (B, H, W, 3), on any device.
    """
    x_BCHW = tiles_BHWC.permute(0, 3, 1, 2).float()
    grey_BSS = F.interpolate(x_BCHW, (SIDE, SIDE), mode="area").mean(1)
    mean_B11 = grey_BSS.mean((1, 2), keepdim=True)
    deviation_B11 = grey_BSS.std((1, 2), keepdim=True)
    factor_B11 = torch.where(deviation_B11 < _FLAT, 0.0, _LEVELS_A_DEVIATION / deviation_B11.clamp_min(1e-6))
    return ((grey_BSS - mean_B11) * factor_B11 + 128).round().clamp(0, 255).to(torch.uint8)


def is_flat(thumbnails_BSS: Tensor) -> Tensor:
    """True (B,) for tiles without structure, such as background: they are equal to one another and copies of none."""
    levels_BD = thumbnails_BSS.flatten(1)
    return (levels_BD.amin(1) == 128) & (levels_BD.amax(1) == 128)  # not ==, which takes as much memory again


class Descriptor(NamedTuple):
    """Form of a descriptor."""

    size: int
    """K."""
    slope: float
    """Coefficients are multiplied by their frequency to this power, or the lowest would decide alone."""

    @property
    def length(self) -> int:
        """D."""
        return self.size**2 - 1


COARSE = Descriptor(8, 0.5)
"""Finds candidates: tolerates shifts of half a window's step."""
FINE = Descriptor(12, 1.0)
"""Decides alone, about tiles that were not shifted."""


def descriptors(thumbnails_BSS: Tensor, form: Descriptor, offset: tuple[int, int] = (0, 0)) -> Tensor:
    """Unit vectors (B, D) of a window of each thumbnail; zero for flat tiles.

    Args:
        thumbnails_BSS: uint8.
        form: of the descriptor.
        offset: rows and columns of the window's centre from the thumbnail's.
    """
    side = SIDE - 2 * STEP
    top, left = STEP + offset[0], STEP + offset[1]
    window = thumbnails_BSS[:, top : top + side, left : left + side].float() - 128
    basis_KS = torch.from_numpy(_basis(side, form.size)).to(window.device)
    c_BKK = basis_KS @ window @ basis_KS.T * torch.from_numpy(_weights(form)).to(window.device)
    return F.normalize(c_BKK.flatten(1)[:, 1:], dim=1)


def oriented(descriptors_BD: Tensor, form: Descriptor, orientation: int) -> Tensor:
    """Descriptors (B, D) of the tiles in another orientation."""
    order_D, sign_D = (torch.from_numpy(x).to(descriptors_BD.device) for x in _orientation(form.size, orientation))
    return descriptors_BD[:, order_D] * sign_D


def turned(pictures_BSS: Tensor, orientation: int) -> Tensor:
    """Pictures (B, S, S) in an orientation."""
    axes = [axis for bit, axis in ((1, 2), (2, 1)) if orientation & bit]
    flipped = pictures_BSS.flip(axes) if axes else pictures_BSS
    return flipped.transpose(1, 2) if orientation & 4 else flipped


@cache
def _basis(side: int, size: int) -> Floats:
    """Orthonormal cosines (K, S) of the DCT of type II."""
    place_S, frequency_K1 = np.arange(side) + 0.5, np.arange(size)[:, None]
    basis_KS = np.cos(np.pi * frequency_K1 * place_S / side) * math.sqrt(2 / side)
    basis_KS[0] /= math.sqrt(2)
    return basis_KS.astype(np.float32)


@cache
def _weights(form: Descriptor) -> Floats:
    """Weights (K, K) of the coefficients; none for the mean."""
    frequency_K = np.arange(form.size)
    weights_KK = np.hypot(frequency_K[:, None], frequency_K) ** form.slope
    return weights_KK.astype(np.float32)


@cache
def _orientation(size: int, orientation: int) -> tuple[npt.NDArray[np.int64], Floats]:
    """Order and signs (D,) that a descriptor's numbers take in an orientation."""
    number_KK = np.arange(size**2).reshape(size, size)
    odd_K = np.where(np.arange(size) % 2, -1, 1).astype(np.float32)
    sign_KK = np.ones((size, size), np.float32)
    if orientation & 1:
        sign_KK = sign_KK * odd_K
    if orientation & 2:
        sign_KK = sign_KK * odd_K[:, None]
    if orientation & 4:
        number_KK, sign_KK = number_KK.T, sign_KK.T
    return number_KK.flatten()[1:] - 1, sign_KK.flatten()[1:]
