"""k-means clusters of the tiles' features against their classes.

Legend: N tiles, D features (unit length), K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
_STARTS = 10


@dataclass(frozen=True)
class Cluster:
    """One cluster."""

    number: int
    rows: Integers
    """Its tiles, the nearest to its centroid first."""
    label: int | None
    """Its most frequent class, the first of equals; None where none of its tiles has one."""
    purity: float | None
    """Share of its labelled tiles that are of that class."""


@dataclass(frozen=True)
class Clustering:
    """The clusters, numbered from 0 by falling size."""

    assignments_N: Integers
    clusters: list[Cluster]
    purity: float | None
    """Share of all labelled tiles that are of their cluster's most frequent class; None without labels."""
    nmi: float | None
    """Normalised mutual information (arithmetic mean) of cluster and class over labelled tiles."""
    centroids_KD: Numbers


def cluster(features_ND: Numbers, labels_N: Integers, clusters: int, seed: int) -> Clustering:
    """k-means (squared Euclidean on unit length, ten k-means++ starts), at most as many clusters as tiles.

    Args:
        features_ND: of the tiles.
        labels_N: their classes.
        clusters: wanted.
        seed: of k-means.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import normalized_mutual_info_score

    count = min(clusters, len(np.unique(features_ND, axis=0)))
    # One thread: a sum in another order can send a tile elsewhere, and the page is a function of its seed.
    with threadpool_limits(1):
        model = KMeans(count, n_init=_STARTS, random_state=seed).fit(features_ND)
    found_N, centroids_KD = model.labels_.astype(np.int64), model.cluster_centers_
    order = np.argsort(-np.bincount(found_N, minlength=count), kind="stable")
    number_K = np.empty(count, np.int64)
    number_K[order] = np.arange(count)
    assignments_N = number_K[found_N]
    centroids_KD = centroids_KD[order]
    parts = [_describe(k, features_ND, labels_N, assignments_N, centroids_KD[k]) for k in range(count)]
    known = labels_N >= 0
    if not known.any():
        return Clustering(assignments_N, parts, None, None, centroids_KD)
    right = sum(int((labels_N[part.rows] == part.label).sum()) for part in parts if part.label is not None)
    nmi = float(normalized_mutual_info_score(labels_N[known], assignments_N[known]))
    return Clustering(assignments_N, parts, right / int(known.sum()), nmi, centroids_KD)


def nearest_centroid(features_ND: Numbers, centroids_KD: Numbers) -> Integers:
    """The nearest of the centroids to each tile, (N,); of equally near ones the first."""
    # |f - c|^2 less |f|^2, which is the same for all centroids
    distance_NK = np.square(centroids_KD).sum(axis=1) - 2 * features_ND @ centroids_KD.T
    return np.asarray(distance_NK.argmin(axis=1), np.int64)


def _describe(
    number: int, features_ND: Numbers, labels_N: Integers, assignments_N: Integers, centroid_D: Numbers
) -> Cluster:
    rows = np.flatnonzero(assignments_N == number)
    distance = np.square(features_ND[rows] - centroid_D).sum(axis=1)
    rows = rows[np.argsort(distance, kind="stable")]
    held = labels_N[rows][labels_N[rows] >= 0]
    if not len(held):
        return Cluster(number, rows, None, None)
    counts = np.bincount(held)
    return Cluster(number, rows, int(counts.argmax()), float(counts.max() / len(held)))
