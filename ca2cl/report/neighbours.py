"""Nearest neighbours of some tiles by cosine similarity.

Legend: N tiles, Q queries, k neighbours, D features (unit length).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.splits import stratified_sample
from ca2cl.report.places.tile_places import share_by_chance
from ca2cl.report.tiles import Tiles

NEIGHBOURS = 8
PER_CLASS, UNLABELLED, MOST = 3, 12, 60
"""Queries of every class; of tiles without labels; and of all together, so that many classes get fewer each."""
_ROWS = 512
_DIGITS = 9

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Retrieval:
    """Queries with their neighbours, nearest first."""

    queries: list[int]
    neighbours: list[list[int]]
    cosines: list[list[float]]
    precision: float | None
    """Mean share, over all labelled tiles, of labelled neighbours that have the tile's class; None without labels."""
    own_slide: float | None = None
    """Mean share, over all tiles with places, of neighbours from the tile's own slide; None without places."""
    chance: float | None = None
    """Share that neighbours drawn at random would have."""


def retrieve(tiles: Tiles, seed: int, k: int = NEIGHBOURS) -> Retrieval:
    """Draw the queries by seed and find their neighbours among all other tiles of the page."""
    queries_Q = draw_queries(tiles.labels_N, seed)
    nearest_Nk, cosine_Nk = nearest(tiles.features_ND, k)
    slide_N = tiles.places.slide_N if tiles.places else None
    return Retrieval(
        queries=queries_Q.tolist(),
        neighbours=nearest_Nk[queries_Q].tolist(),
        cosines=cosine_Nk[queries_Q].tolist(),
        precision=precision(nearest_Nk, tiles.labels_N),
        own_slide=precision(nearest_Nk, slide_N) if slide_N is not None else None,
        chance=share_by_chance(slide_N) if slide_N is not None else None,
    )


def draw_queries(labels_N: Integers, seed: int) -> Integers:
    """Rows of the queries, class by class, unlabelled tiles only where there is no other kind."""
    labels = np.unique(labels_N[labels_N >= 0])
    if not len(labels):
        return stratified_sample(np.zeros(len(labels_N), np.int64), UNLABELLED, seed)
    each = max(1, min(PER_CLASS, MOST // len(labels)))
    drawn = []
    for label in labels[:MOST]:
        rows = np.flatnonzero(labels_N == label)
        drawn.append(rows[stratified_sample(np.zeros(len(rows), np.int64), each, seed)])
    return np.concatenate(drawn)


def nearest(features_ND: Numbers, k: int) -> tuple[Integers, Numbers]:
    """The k nearest other rows of every row by cosine, and the cosines; fewer where there are no k others.

    Cosines are rounded to nine digits before they are compared, so that the same pixels under two names are equally
    near on any machine; of equally near rows the earlier comes first.
    """
    count = len(features_ND)
    k = min(k, count - 1)
    nearest_Nk, cosine_Nk = np.empty((count, k), np.int64), np.empty((count, k))
    for start in range(0, count, _ROWS):
        rows = np.arange(start, min(start + _ROWS, count))
        cosine_RN = (features_ND[rows] @ features_ND.T).round(_DIGITS)
        cosine_RN[np.arange(len(rows)), rows] = -np.inf  # a tile is not its own neighbour
        nearest_Nk[rows] = np.argsort(-cosine_RN, axis=1, kind="stable")[:, :k]
        cosine_Nk[rows] = np.take_along_axis(cosine_RN, nearest_Nk[rows], axis=1)
    return nearest_Nk, cosine_Nk


def precision(nearest_Nk: Integers, labels_N: Integers) -> float | None:
    """Mean over labelled tiles of the share of their labelled neighbours that are of their class (or slide)."""
    known_Nk = (labels_N[nearest_Nk] >= 0) & (labels_N >= 0)[:, None]
    same_Nk = known_Nk & (labels_N[nearest_Nk] == labels_N[:, None])
    asked_N = known_Nk.sum(axis=1)
    if not asked_N.any():
        return None
    return float((same_Nk.sum(axis=1)[asked_N > 0] / asked_N[asked_N > 0]).mean())
