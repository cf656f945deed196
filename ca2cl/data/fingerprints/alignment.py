"""Correlation of two thumbnails at the shift that fits best.

Legend: P pairs, S side of a thumbnail, Z side of the padded transform.
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
"""Standard deviation in pixels of the blur that is taken away: slow shading is alike in many tiles."""


def correlations(first_PSS: Tensor, second_PSS: Tensor) -> Tensor:
    """Pearson correlation (P,) of the structure of each pair, over the part that both show, at the best shift.

    Args:
        first_PSS: thumbnails.
        second_PSS: those that are compared with them, in the same orientation.
    """
    a_PSS, b_PSS = _structure(first_PSS), _structure(second_PSS)
    ones = torch.ones_like(a_PSS[:1])
    products = [
        _products(x, y) for x, y in ((a_PSS, b_PSS), (a_PSS, ones), (ones, b_PSS), (a_PSS**2, ones), (ones, b_PSS**2))
    ]
    ab, a, b, aa, bb = products
    overlap = _products(ones, ones)
    covariance = ab - a * b / overlap
    variances = (aa - a**2 / overlap).clamp_min(0) * (bb - b**2 / overlap).clamp_min(0)
    return (covariance / variances.sqrt().clamp_min(1e-3)).flatten(1).amax(1)


def _products(a_PSS: Tensor, b_PSS: Tensor) -> Tensor:
    """Sums (P, 2R + 1, 2R + 1) of products of ``a`` and ``b`` over their overlap at all shifts within reach."""
    padded = (SIDE + REACH, SIDE + REACH)
    spectrum = torch.fft.rfft2(a_PSS, padded).conj() * torch.fft.rfft2(b_PSS, padded)
    sums = torch.fft.irfft2(spectrum, padded)
    shifts = torch.arange(-REACH, REACH + 1, device=sums.device) % padded[0]
    near: Tensor = sums[:, shifts][:, :, shifts]
    return near


def _structure(pictures_PSS: Tensor) -> Tensor:
    """Pictures less their blur."""
    x_PSS = pictures_PSS.float() - 128
    blur_SS = torch.from_numpy(_blur()).to(x_PSS.device)
    return x_PSS - blur_SS @ x_PSS @ blur_SS.T


@cache
def _blur() -> npt.NDArray[np.float32]:
    """Gaussian blur along one axis as a matrix (S, S), its rows normalised at the border."""
    place_S = np.arange(SIDE)
    weight_SS = np.exp(-((place_S[:, None] - place_S) ** 2) / (2 * _BLUR**2))
    blur_SS: npt.NDArray[np.float32] = (weight_SS / weight_SS.sum(1, keepdims=True)).astype(np.float32)
    return blur_SS
