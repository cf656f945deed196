"""The tiles' features in two dimensions, for the eye.

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
    """Places, shape (N, 2), and how they were found: x from 0 to 1, y from 0 to ``height``, which is 1 or less."""

    xy_N2: npt.NDArray[np.float64]
    height: float
    method: str
    islands: bool
    """Whether distances between groups mean little, as in t-SNE."""


def draw_map(features_ND: npt.NDArray[np.float64], seed: int) -> Map:
    """t-SNE after PCA to 50 dimensions, or two principal components of fewer than ten tiles."""
    from sklearn.decomposition import PCA

    count = len(features_ND)
    # One thread: t-SNE adds its forces up in the order in which threads finish, and grows what rounding leaves.
    with threadpool_limits(1):
        dimensions = min(_COMPONENTS if count >= _FEWEST else 2, *features_ND.shape)
        reduced = PCA(dimensions, svd_solver="full").fit_transform(features_ND) if count > 1 else np.zeros((1, 2))
        if count < _FEWEST:
            return Map(*_framed(reduced), "the first two principal components", islands=False)
        return _t_sne(reduced, seed)


def _t_sne(reduced: npt.NDArray[np.float64], seed: int) -> Map:
    from sklearn.manifold import TSNE

    perplexity = min(_PERPLEXITY, (len(reduced) - 1) / 3)
    if np.ptp(reduced, axis=0).max() == 0:  # nothing to tell apart, and t-SNE would divide by it
        return Map(*_framed(reduced), "all tiles have the same features", islands=False)
    placed = TSNE(2, perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed).fit_transform(reduced)
    placed = placed.astype(np.float64)
    method = f"t-SNE of the first {reduced.shape[1]} principal components, perplexity {perplexity:g}, seed {seed}"
    return Map(*_framed(placed), method, islands=True)


def _framed(placed_NC: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], float]:
    """The first two columns, turned so that they spread most from left to right, and the height that they need.

    Neither method knows of left and right, and a screen is rarely higher than a page is long.
    """
    xy_N2 = np.zeros((len(placed_NC), 2))
    xy_N2[:, : placed_NC.shape[1]] = placed_NC[:, :2]
    xy_N2 -= xy_N2.mean(axis=0)
    _, axes_22 = np.linalg.eigh(xy_N2.T @ xy_N2)
    signs_2 = np.where(axes_22[np.abs(axes_22).argmax(axis=0), np.arange(2)] < 0, -1, 1)  # an axis has no direction
    xy_N2 = (xy_N2 @ (axes_22 * signs_2))[:, ::-1]
    xy_N2 = xy_N2 - xy_N2.min(axis=0)
    side = float(xy_N2.max())
    if side == 0:
        return np.full_like(xy_N2, 0.5), 1.0
    xy_N2 /= side
    return xy_N2 + [0.5 - xy_N2[:, 0].max() / 2, 0], float(xy_N2[:, 1].max())
