"""Correlation of two thumbnails at the shift that fits best.

Legend: P pairs, S side of a thumbnail, R shifts along an axis.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.data.fingerprints.thumbnails import SIDE

REACH = 4
"""Largest shift along each axis in pixels of a thumbnail: 16 pixels of a tile of 224."""
_BLUR = 5.0
"""Standard deviation in pixels of the blur that is taken away, and of the neighbourhoods of equal contrast."""
_FLOOR = 2.0
"""Grey levels that are added to the contrast of a neighbourhood, so that an empty one stays empty."""


def correlations(first_PSS: Tensor, second_PSS: Tensor) -> Tensor:
    """Pearson correlation (P,) of the structure of each pair, over the part that both show, at the best shift.

    Args:
        first_PSS: thumbnails.
        second_PSS: those that are compared with them, in the same orientation.
    """
    a_PSS, b_PSS = _structure(first_PSS), _structure(second_PSS)
    inside_RS = torch.from_numpy(_inside()).to(a_PSS.device)
    overlap_RR = inside_RS.sum(1)[:, None] * inside_RS.sum(1)
    a, aa = (inside_RS @ x_PSS @ inside_RS.T for x_PSS in (a_PSS, a_PSS**2))
    beyond_RS = inside_RS.flip(0)
    b, bb = (beyond_RS @ x_PSS @ beyond_RS.T for x_PSS in (b_PSS, b_PSS**2))
    covariance = _products(a_PSS, b_PSS) - a * b / overlap_RR
    variances = (aa - a**2 / overlap_RR).clamp_min(0) * (bb - b**2 / overlap_RR).clamp_min(0)
    return (covariance / variances.sqrt().clamp_min(1e-3)).flatten(1).amax(1)


def _products(a_PSS: Tensor, b_PSS: Tensor) -> Tensor:
    """Sums (P, R, R) of products of ``a`` and ``b`` over their overlap at all shifts within reach."""
    padded = (SIDE + REACH, SIDE + REACH)
    spectrum = torch.fft.rfft2(a_PSS, padded).conj() * torch.fft.rfft2(b_PSS, padded)
    sums = torch.fft.irfft2(spectrum, padded)
    shifts = torch.arange(-REACH, REACH + 1, device=sums.device) % padded[0]
    near: Tensor = sums[:, shifts][:, :, shifts]
    return near


@cache
def _inside() -> npt.NDArray[np.float32]:
    """Ones (R, S) at the places that overlap the other picture at each shift along an axis."""
    moved_RS = np.arange(SIDE) + np.arange(-REACH, REACH + 1)[:, None]
    inside_RS: npt.NDArray[np.float32] = ((moved_RS >= 0) & (moved_RS < SIDE)).astype(np.float32)
    return inside_RS


def _structure(pictures_PSS: Tensor) -> Tensor:
    """Pictures less their blur, divided by the contrast of each neighbourhood.

    Slow shading is alike in many tiles. So is the strongest edge: without the division, the border of a lumen or of the
    tissue decides alone about a tile, and two tiles with such a border at the same place are taken for copies.
    """
    x_PSS = pictures_PSS.float() - 128
    blur_SS = torch.from_numpy(_blur()).to(x_PSS.device)
    x_PSS = x_PSS - blur_SS @ x_PSS @ blur_SS.T
    return x_PSS / ((blur_SS @ x_PSS**2 @ blur_SS.T).sqrt() + _FLOOR)


@cache
def _blur() -> npt.NDArray[np.float32]:
    """Gaussian blur along one axis as a matrix (S, S), its rows normalised at the border."""
    place_S = np.arange(SIDE)
    weight_SS = np.exp(-((place_S[:, None] - place_S) ** 2) / (2 * _BLUR**2))
    blur_SS: npt.NDArray[np.float32] = (weight_SS / weight_SS.sum(1, keepdims=True)).astype(np.float32)
    return blur_SS
