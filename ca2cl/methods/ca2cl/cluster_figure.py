"""Figure of k-means clusters: a row of tiles for each.

Shapes: N tiles, H and W their sides in pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def cluster_figure(
    tiles_NHWC: npt.NDArray[np.uint8],
    assignments_N: npt.NDArray[np.integer[Any]],
    clusters: int | None = None,
    *,
    title: str = "",
    columns: int = 10,
) -> Figure:
    """A row of tiles for each cluster, the largest cluster first, titled with its size; empty clusters are named below.

    Args:
        tiles_NHWC: uint8 (N, H, W, 3).
        assignments_N: cluster of each tile, 0 to ``clusters`` - 1.
        clusters: number of clusters; None takes the largest assignment + 1.
        columns: tiles shown of each cluster: the first ones.
    """
    from matplotlib.figure import Figure

    if len(tiles_NHWC) != len(assignments_N):
        raise ValueError(f"{len(tiles_NHWC)} tiles but {len(assignments_N)} assignments: give one for each")
    total = clusters if clusters is not None else int(assignments_N.max(initial=-1)) + 1
    sizes = np.bincount(assignments_N, minlength=total)
    order = [int(k) for k in np.argsort(-sizes, kind="stable") if sizes[k]]
    empty = [str(k) for k in range(total) if not sizes[k]]
    # Margins in inches: constrained layout forgets that a strip of fixed shape does not fill its axes, and cuts labels.
    width, height = columns * 0.9 + 1.2, 0.95 * max(1, len(order)) + 0.5
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=1.1 / width, right=1 - 0.1 / width, top=1 - 0.4 / height, bottom=0.1 / height)
    heading = ", ".join([title] * bool(title) + [f"empty: {', '.join(empty)}"] * bool(empty))
    figure.suptitle(heading, fontsize=10)
    for row, cluster in enumerate(order):
        axes = figure.add_subplot(len(order), 1, row + 1)
        axes.imshow(_strip(tiles_NHWC[assignments_N == cluster][:columns], columns), interpolation="bilinear")
        share = sizes[cluster] / len(assignments_N)
        axes.set_ylabel(
            f"cluster {cluster}\n{sizes[cluster]} tiles\n{share:.0%}", rotation=0, ha="right", va="center", fontsize=8
        )
        axes.set(xticks=[], yticks=[], anchor="W")
        axes.spines[:].set_visible(False)
    return figure


def _strip(tiles_NHWC: npt.NDArray[np.uint8], columns: int, gap: int = 2) -> npt.NDArray[np.uint8]:
    """Up to ``columns`` tiles side by side on white, shape (H, columns·(W + gap), 3)."""
    _, height, width, _ = tiles_NHWC.shape
    strip = np.full((height, columns * (width + gap), 3), 255, np.uint8)
    for place, tile_HWC in enumerate(tiles_NHWC):
        left = place * (width + gap)
        strip[:, left : left + width] = tile_HWC
    return strip
