"""Two-dimensional map of the tiles' features by t-SNE.

Legend: N tiles, D features (unit length).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

_FEWEST = 10
"""t-SNE of fewer tiles than this shows nothing that principal components do not."""
_COMPONENTS, _PERPLEXITY = 50, 30.0


@dataclass(frozen=True)
class Map:
    """Places in the unit square, shape (N, 2), and how they were found."""

    xy_N2: npt.NDArray[np.float64]
    method: str
    islands: bool
    """Distances between groups mean little, as in t-SNE."""


def draw_map(features_ND: npt.NDArray[np.float64], seed: int) -> Map:
    """t-SNE after PCA to 50 dimensions, or two principal components of fewer than ten tiles."""
    from sklearn.decomposition import PCA

    count = len(features_ND)
    if np.ptp(features_ND, axis=0).max() == 0:  # both methods would divide by it
        return Map(np.full((count, 2), 0.5), "nothing: all tiles have the same features", islands=False)
    # One thread: t-SNE adds its forces up in the order in which threads finish, and grows what rounding leaves.
    with threadpool_limits(1):
        dimensions = min(_COMPONENTS if count >= _FEWEST else 2, *features_ND.shape)
        reduced = PCA(dimensions, svd_solver="full").fit_transform(features_ND)
        if count < _FEWEST:
            return Map(_framed(reduced), "the first two principal components", islands=False)
        return _t_sne(reduced, seed)


def _t_sne(reduced: npt.NDArray[np.float64], seed: int) -> Map:
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(reduced) - 1) / 3)
    placed = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(reduced)
    placed = placed.astype(np.float64)
    method = f"t-SNE of the first {reduced.shape[1]} principal components, perplexity {perplexity:.3g}, seed {seed}"
    return Map(_framed(placed), method, islands=True)


def _framed(placed_NC: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The first two columns, turned so that they spread most along the square's diagonal, where there is most room.

    Neither method knows of left and right.
    """
    xy_N2 = np.zeros((len(placed_NC), 2))
    xy_N2[:, : placed_NC.shape[1]] = placed_NC[:, :2]
    xy_N2 -= xy_N2.mean(axis=0)
    _, axes_22 = np.linalg.eigh(xy_N2.T @ xy_N2)
    signs_2 = np.where(axes_22[np.abs(axes_22).argmax(axis=0), np.arange(2)] < 0, -1, 1)  # an axis has no direction
    narrow_N, wide_N = (xy_N2 @ (axes_22 * signs_2)).T
    turned_N2 = np.stack([wide_N + narrow_N, wide_N - narrow_N], axis=1)
    low_2, high_2 = turned_N2.min(axis=0), turned_N2.max(axis=0)
    side = float((high_2 - low_2).max())
    return np.asarray(0.5 + (turned_N2 - (low_2 + high_2) / 2) / (side if side > 0 else 1), np.float64)
