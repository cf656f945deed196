"""Find clusters of the tiles' vectors, over all slides together.

Legend: N tiles, D features, K clusters.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.clusters import cluster, nearest_centroid
from ca2cl.evaluation.features import FloatArray, mean_of, scaled
from ca2cl.heatmap.vectors import sample_vectors

_MOST = 10_000
"""Tiles that centroids are found with."""


class ClusterHead(NamedTuple):
    """The nearest of the centroids ``centroids_KD`` of features less a mean and of unit length."""

    centroids_KD: npt.NDArray[np.float64]
    mean_D: FloatArray

    def probabilities(self, values_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """1 for the nearest and 0 for all others, (N, K)."""
        features_ND = np.asarray(scaled(values_ND.astype(np.float64), self.mean_D), np.float64)
        return np.eye(len(self.centroids_KD))[nearest_centroid(features_ND, self.centroids_KD)]


def find_clusters(vectors: Path, count: int, seed: int) -> ClusterHead:
    """k-means of vectors less their mean and of unit length, as in ``ca2cl report``; clusters by falling size.

    Args:
        vectors: a Parquet file of ``ca2cl embed``.
        count: of clusters; fewer tiles have fewer.
        seed: of the tiles that are drawn, where there are many, and of k-means.
    """
    sample_ND = sample_vectors(vectors, _MOST, seed).astype(np.float64)
    mean_D = mean_of(sample_ND)
    features_ND = np.asarray(scaled(sample_ND, mean_D), np.float64)
    return ClusterHead(cluster(features_ND, np.full(len(features_ND), -1), count, seed).centroids_KD, mean_D)
