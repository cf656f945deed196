"""Fat and other pale tissue, which hardly takes up stain.

Legend: H, W pixels of the overview.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from ca2cl.slides.tissue.density import Density, Mask
from ca2cl.slides.tissue.shapes import closed, fill_small, grown, opened, window

_PALE = 0.005
"""Chroma of thin walls at 7 micrometres a pixel; 98 % of the pixels of clean glass have less."""
_WALL, _LEAST_WALLS = 0.018, 0.04
"""Chroma of walls, and the share of them in a patch of fat. A film of mounting medium is pale all over."""
_STAINED, _MOST_STAINED, _NEIGHBOURHOOD = 0.05, 0.35, 150.0
"""Chroma of stained tissue, and its share in a square of so many micrometres beyond which a gap is no fat."""
_GAP = 25.0
"""Micrometres: half of the widest gap in a wall that is closed."""
_LARGEST_CELL = 15_000.0
"""Square micrometres: a fat cell of 140 micrometres, or a few with a gap between them."""
_THICKNESS = 100.0
"""Micrometres of a patch of fat, which a blurred rim of stained tissue does not have."""
_INK_EDGE = 25.0
"""Micrometres around ink in which colour is no wall."""


def pale_tissue(chroma: Density, ink: Mask, mpp: float) -> Mask:
    """Meshes of thin pale walls around empty cells, bool (H, W), where there is little stained tissue around.

    Args:
        chroma: of the overview.
        ink: pen and black marks, which are neither walls nor cells.
        mpp: micrometres a pixel.
    """
    stained = (chroma > np.float16(_STAINED)) & ~ink
    near = ndimage.uniform_filter(stained.astype(np.float32), window(_NEIGHBOURHOOD / 2, mpp), mode="nearest")
    pale = (chroma > np.float16(_PALE)) & (near < _MOST_STAINED)
    mesh = fill_small(closed(pale & ~ink, _GAP, mpp), _LARGEST_CELL, mpp) & ~ink
    mesh &= grown(opened(mesh, _THICKNESS / 2, mpp), _THICKNESS, mpp)
    return _with_walls(mesh, (chroma > np.float16(_WALL)) & ~grown(ink, _INK_EDGE, mpp))


def _with_walls(mesh: Mask, walls: Mask) -> Mask:
    """The patches that have enough of ``walls``."""
    labels, patches = ndimage.label(mesh, np.ones((3, 3)))
    pixels = np.bincount(labels.ravel(), minlength=patches + 1)
    found = np.bincount(labels[walls], minlength=patches + 1)
    kept = found >= _LEAST_WALLS * pixels
    kept[0] = False
    return np.asarray(kept[labels])
