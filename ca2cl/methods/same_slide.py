"""Negatives of the anchor's slide: how many there are in a batch.

Shapes: B local rows, G rows of the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ca2cl.methods.base import Panel
from ca2cl.methods.gather import Rows

COUNTERS = {"anchors_without_negatives": "anchors whose negatives are all of their slide, and left out"}
"""Counter of a method whose weight of same-slide negatives is 0."""
PANEL: Panel = ("Same-slide negatives", "share of negatives", (("same_slide_negatives", ""),))


def same_slide_terms(rows: Rows, weight: float) -> dict[str, Tensor]:
    """This rank's share of ``same_slide_negatives``, the mean share of an anchor's negatives that are of its slide.

    With a weight of 0 also of ``anchors_without_negatives``: all tiles of the batch are of their slide.

    Args:
        rows: of all ranks; without slides there are no terms.
        weight: of negatives of the anchor's slide.
    """
    if rows.slides is None:
        return {}
    own_B, tiles = rows.slides[rows.own], len(rows.slides)
    sorted_G = rows.slides.sort().values
    alike_B = torch.searchsorted(sorted_G, own_B, right=True) - torch.searchsorted(sorted_G, own_B)
    terms = {"same_slide_negatives": (alike_B - 1).sum(dtype=torch.float64) / (tiles * max(1, tiles - 1))}
    if weight == 0:
        terms["anchors_without_negatives"] = 2 * (alike_B == tiles).sum(dtype=torch.float64)
    return terms
