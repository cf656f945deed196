"""Nearest tiles of a class elsewhere, and of others in the centre.

Terms are those of Kömen et al. (PathoROB, arXiv 2507.17845) and Grisi et al. (arXiv 2607.25497): SO, same class and
other centre, is evidence of biology; OS, other class and same centre, is evidence of the centre.

Legend: N tiles, B of them at a time, D features, K neighbours, M nearest of either type.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
_BLOCK_BYTES = 32_000_000


@dataclass(frozen=True)
class Neighbours:
    """Neighbours of every tile outside its own group, by cosine distance in double precision."""

    index_NK: IntArray
    """Nearest first; -1 where there are fewer than K."""
    distance_NK: Numbers
    """Infinite where there are fewer than K."""
    same_NM: Numbers
    """Distances to the M nearest of SO, in any order; infinite where there are fewer."""
    other_NM: Numbers
    """Distances to the M nearest of OS."""


def typed_neighbours(
    values_ND: npt.NDArray[np.floating[Any]], labels_N: IntArray, center_N: IntArray, group_N: IntArray, *, k: int,
    m: int,
) -> Neighbours:  # fmt: skip
    """Search once for everything that the indices need; memory grows with N, time with N squared.

    Args:
        values_ND: features, as the encoder gives them.
        labels_N: class of every tile.
        center_N: centre of every tile.
        group_N: slide or patient of every tile: tiles of the own one are no neighbours.
        k: nearest ones of any type that are kept.
        m: nearest ones of SO and of OS whose distances are kept.
    """
    count = len(values_ND)
    norm_N1 = np.linalg.norm(values_ND.astype(np.float64), axis=1, keepdims=True)
    unit_ND = values_ND / np.where(norm_N1 > 0, norm_N1, 1.0)
    index_NK, distance_NK = np.full((count, k), -1), np.full((count, k), np.inf)
    same_NM, other_NM = np.full((count, m), np.inf), np.full((count, m), np.inf)
    rows = max(1, _BLOCK_BYTES // (8 * count))
    for start in range(0, count, rows):
        at = slice(start, start + rows)
        distance_BN = np.clip(1.0 - unit_ND[at] @ unit_ND.T, 0.0, 2.0)
        distance_BN[group_N[at, None] == group_N] = np.inf
        same_class_BN, same_center_BN = labels_N[at, None] == labels_N, center_N[at, None] == center_N
        same = _smallest(np.where(same_class_BN & ~same_center_BN, distance_BN, np.inf), m)
        other = _smallest(np.where(~same_class_BN & same_center_BN, distance_BN, np.inf), m)
        same_NM[at, : same.shape[1]], other_NM[at, : other.shape[1]] = same, other
        nearest_BK = np.argpartition(distance_BN, min(k, count) - 1, axis=1)[:, :k]
        held_BK = np.take_along_axis(distance_BN, nearest_BK, axis=1)
        order_BK = np.lexsort((nearest_BK, held_BK), axis=1)
        nearest_BK, held_BK = (np.take_along_axis(found, order_BK, axis=1) for found in (nearest_BK, held_BK))
        index_NK[at, : nearest_BK.shape[1]] = np.where(np.isfinite(held_BK), nearest_BK, -1)
        distance_NK[at, : held_BK.shape[1]] = held_BK
    return Neighbours(index_NK, distance_NK, same_NM, other_NM)


def _smallest(distance_BN: Numbers, m: int) -> Numbers:
    m = min(m, distance_BN.shape[1])
    return np.partition(distance_BN, m - 1, axis=1)[:, :m]
