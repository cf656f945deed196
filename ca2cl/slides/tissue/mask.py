"""Mask of a slide's tissue, and the share of it in boxes.

Legend: H, W pixels of the overview, N boxes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from skimage.filters import threshold_otsu

from ca2cl.slides.tissue.artefacts import black_marks, folds, pen_marks
from ca2cl.slides.tissue.density import Density, Mask, Pixels, stain_of
from ca2cl.slides.tissue.fat import pale_tissue
from ca2cl.slides.tissue.shapes import drop_small, fill_small

MASK_TILE_PIXELS = 16
"""Pixels of the mask along the side of a tile."""
_CHROMA_RANGE = 0.033, 0.05
"""Otsu's threshold is kept within: an empty slide has nothing above, pale mucus and stroma little below."""
_FLOOR, _BINS = 0.003, 256
"""Chroma that counts as none, and bins of the histogram above it."""
_LARGEST_HOLE, _SMALLEST_TISSUE = 1000.0, 2500.0
"""Square micrometres: a gap of 36 micrometres, and a clump of some 50 cells."""


@dataclass(frozen=True)
class TissueMask:
    """Where a slide has tissue."""

    tissue: Mask
    """(H, W), without artefacts."""
    artefacts: Mapping[str, Mask]
    """``pen``, ``black`` and ``fold``, each (H, W); none overlaps another."""
    mpp: float
    """Micrometres a pixel."""


def tissue_mask(rgb_HWC: Pixels, mpp: float) -> TissueMask:
    """Find a slide's tissue by its colour.

    Tissue is what takes up colour: its chroma in optical density is above a threshold, which Otsu's method finds on
    a logarithmic scale, within fixed bounds. Grey dust and the edge of the cover glass have no chroma, however dark.
    Fat is looked for by the walls of its cells. Small holes are filled and small patches dropped.

    Args:
        rgb_HWC: the whole slide, shrunk by area averaging; 255 outside of the scanned region.
        mpp: its micrometres a pixel.
    """
    stain = stain_of(rgb_HWC)
    density, chroma = stain.mean, stain.chroma
    pen = pen_marks(stain, density, mpp)
    black = black_marks(density, chroma, mpp) & ~pen
    ink = pen | black
    stained = (chroma > np.float16(chroma_threshold(chroma[~ink]))) & ~ink
    tissue = fill_small(stained, _LARGEST_HOLE, mpp)
    tissue |= pale_tissue(chroma, ink, mpp)
    tissue &= ~ink
    tissue = drop_small(tissue, _SMALLEST_TISSUE, mpp)
    fold = folds(stain, density, tissue, mpp)
    return TissueMask(tissue & ~fold, MappingProxyType({"pen": pen, "black": black, "fold": fold}), mpp)


def chroma_threshold(chroma: Density) -> float:
    """Otsu's threshold of log chroma, within the bounds of what glass and the palest tissue have."""
    logarithm = np.log(np.maximum(chroma, np.float16(_FLOOR)), dtype=np.float32)
    if not logarithm.size or logarithm.min() == logarithm.max():
        return _CHROMA_RANGE[0]
    counts, edges = np.histogram(logarithm, bins=_BINS)
    otsu = threshold_otsu(hist=(counts, (edges[1:] + edges[:-1]) / 2))
    return float(np.clip(np.exp(otsu), *_CHROMA_RANGE))


def shares(mask_HW: Mask, boxes_N4: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Share of each box that is True, (N,); what lies outside of the mask counts as False.

    Exact for fractional boxes: the integral of a mask is bilinear within each pixel.

    Args:
        mask_HW: a mask.
        boxes_N4: ``x0, y0, x1, y1`` in pixels of the mask, ``x0 < x1`` and ``y0 < y1``.
    """
    height, width = mask_HW.shape
    integral = np.zeros((height + 1, width + 1))
    np.cumsum(np.cumsum(mask_HW, axis=0, dtype=np.int32), axis=1, out=integral[1:, 1:])
    x_2N = np.clip(boxes_N4[:, [0, 2]].T, 0, width)
    y_2N = np.clip(boxes_N4[:, [1, 3]].T, 0, height)
    corners = [[_bilinear(integral, x_N, y_N) for x_N in x_2N] for y_N in y_2N]
    covered_N = corners[1][1] - corners[1][0] - corners[0][1] + corners[0][0]
    area_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    # Rounded, so that a box that is half covered is not a hair less.
    return np.asarray(np.clip(np.round(covered_N / area_N, 9), 0, 1))


def _bilinear(
    integral: npt.NDArray[np.float64], x_N: npt.NDArray[np.float64], y_N: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    column = np.minimum(x_N.astype(np.int64), integral.shape[1] - 2)
    row = np.minimum(y_N.astype(np.int64), integral.shape[0] - 2)
    right, down = x_N - column, y_N - row
    top = integral[row, column] * (1 - right) + integral[row, column + 1] * right
    bottom = integral[row + 1, column] * (1 - right) + integral[row + 1, column + 1] * right
    return np.asarray(top * (1 - down) + bottom * down)
