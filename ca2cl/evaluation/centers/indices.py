"""RI, MaRI and CRoMa: biology against centre among a tile's neighbours.

Formulas and settings are those of the package croma 1.0.1 (design ``all``), which is compared with in the tests: the
numbers are equal on the same vectors in double precision. RI: Kömen et al., PathoROB, arXiv 2507.17845. MaRI and
CRoMa: Grisi, van der Laak and Litjens, arXiv 2607.25497. All are of one search here, every tile has its share in an
interval, and a tile that cannot be scored is counted instead of ending the job.

Legend: N tiles, K neighbours, M nearest of a type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.centers.resampling import NONE, median_interval, share_interval
from ca2cl.evaluation.centers.typed_neighbours import IntArray, Neighbours, Numbers, typed_neighbours
from ca2cl.evaluation.statistics import Interval, Units

K_CANDIDATES = (5, 11, 21)
"""Numbers of neighbours; the one that votes for classes best is used for RI and MaRI."""
M = 5
"""Nearest neighbours of a type whose distances CRoMa averages."""
TAIL = 0.1
_TAU = 0.2  # where no distance gives a scale, the number does not depend on it
_NAN = float("nan")


@dataclass(frozen=True)
class Indices:
    """Robustness of one kind of features; ``nan`` where no tile can be scored."""

    ri: float
    """Share of SO among the SO and OS neighbours, in [0, 1]; above .5 biology outweighs the centre."""
    ri_interval_95: Interval
    mari: float
    """The same with weights exp(-distance / tau)."""
    mari_interval_95: Interval
    croma: float
    """Median over tiles of (d_OS - d_SO) / (d_OS + d_SO), in (-1, 1); positive where biology is nearer."""
    croma_interval_95: Interval
    croma_tail: float
    """Mean of the lowest tenth of these margins (LTM10)."""
    center_nearer: float
    """Share of tiles with a margin of 0 or less (F0)."""
    k: int
    tau: float
    """Median distance to SO and OS neighbours."""
    support: float
    """Share of tiles with an SO or OS neighbour among the k: only these have a part in RI and MaRI."""
    croma_support: float
    """Share of tiles that have M neighbours of either type; the others have no margin."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def indices(
    values_ND: npt.NDArray[np.floating[Any]], labels_N: IntArray, center_N: IntArray, group_N: IntArray, *,
    candidates: Sequence[int] = K_CANDIDATES, m: int = M, units: Units | None = None,
) -> Indices:  # fmt: skip
    """All three indices of some features.

    Args:
        values_ND: features, as the encoder gives them.
        labels_N: class of every tile.
        center_N: centre of every tile.
        group_N: slide or patient of every tile: tiles of the own one are no neighbours.
        candidates: numbers of neighbours to choose from; those above N - 1 are left out.
        m: nearest neighbours of a type for CRoMa.
        units: what scored tiles are resampled by, for intervals; their neighbours stay the same.
    """
    candidates = [k for k in candidates if k < len(values_ND)]
    if not candidates:
        raise ValueError(f"{len(values_ND)} tiles: fewer than neighbours")
    found = typed_neighbours(values_ND, labels_N, center_N, group_N, k=max(candidates), m=m)
    k = choose_k(found, labels_N, candidates)
    same_NK, other_NK = _types(found, labels_N, center_N, k)
    distance_NK = found.distance_NK[:, :k]
    typed = distance_NK[same_NK | other_NK]
    tau = float(np.median(typed)) if len(typed) and np.median(typed) > 0 else _TAU
    # less the least distance: no weight of all underflows, and shares stay the same
    weight_NK = np.exp(-(distance_NK - (typed.min() if len(typed) else 0.0)) / tau)
    margin_N = margins(found)
    scored = margin_N[np.isfinite(margin_N)]
    counts = _share(same_NK.sum(axis=1), other_NK.sum(axis=1), units)
    weights = _share((weight_NK * same_NK).sum(axis=1), (weight_NK * other_NK).sum(axis=1), units)
    return Indices(
        *counts, *weights,
        croma=float(np.median(scored)) if len(scored) else _NAN,
        croma_interval_95=median_interval(margin_N, units) if units else NONE,
        croma_tail=float(scored[scored <= np.percentile(scored, 100 * TAIL)].mean()) if len(scored) else _NAN,
        center_nearer=float((scored <= 0).mean()) if len(scored) else _NAN,
        k=k,
        tau=tau,
        support=float((same_NK | other_NK).any(axis=1).mean()),
        croma_support=len(scored) / len(margin_N),
    )  # fmt: skip


def margins(found: Neighbours) -> Numbers:
    """CRoMa's margin of every tile, (N,); ``nan`` with fewer than M neighbours of a type, or all at distance 0."""
    same_N, other_N = found.same_NM.mean(axis=1), found.other_NM.mean(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        margin_N = (other_N - same_N) / (other_N + same_N)
    return np.where(np.isfinite(same_N) & np.isfinite(other_N), margin_N, np.nan)


def choose_k(found: Neighbours, labels_N: IntArray, candidates: Sequence[int]) -> int:
    """The number of neighbours whose majority has the best balanced accuracy of classes; the first of equals.

    Of classes with as many votes the one whose first tile comes first wins, as in croma.
    """
    _, first, code_N = np.unique(labels_N, return_index=True, return_inverse=True)
    code_N = np.argsort(np.argsort(first))[code_N]
    scored = (found.index_NK >= 0).any(axis=1)
    if not scored.any():
        return int(candidates[0])
    best, best_score = int(candidates[0]), -1.0
    for k in candidates:
        index_NK = found.index_NK[:, :k]
        votes_NL = np.stack([((code_N[index_NK] == c) & (index_NK >= 0)).sum(axis=1) for c in range(len(first))], 1)
        right_N = votes_NL.argmax(axis=1) == code_N
        score = float(np.mean([right_N[scored & (code_N == c)].mean() for c in np.unique(code_N[scored])]))
        if score > best_score:
            best, best_score = int(k), score
    return best


def _types(found: Neighbours, labels_N: IntArray, center_N: IntArray, k: int) -> tuple[Any, Any]:
    """Masks (N, K) of the SO and of the OS neighbours among the nearest k."""
    index_NK = found.index_NK[:, :k]
    there_NK = index_NK >= 0
    same_class_NK = labels_N[index_NK] == labels_N[:, None]
    same_center_NK = center_N[index_NK] == center_N[:, None]
    return there_NK & same_class_NK & ~same_center_NK, there_NK & ~same_class_NK & same_center_NK


def _share(same_N: npt.NDArray[Any], other_N: npt.NDArray[Any], units: Units | None) -> tuple[float, Interval]:
    total = float(same_N.sum() + other_N.sum())
    if not total:
        return _NAN, NONE
    return float(same_N.sum()) / total, share_interval(same_N, same_N + other_N, units) if units else NONE
