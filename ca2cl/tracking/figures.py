"""Figures of a run: training curves and cluster contents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_number
from ca2cl.tracking.journal import training_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# title, unit, and the journal's names with their labels; a panel without data is left out
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "", (("loss", "total"), ("nt_xent", "NT-Xent"), ("nt_xent_adversarial", "NT-Xent, adversarial"))),
    ("Cluster loss", "", (("cluster", ""),)),
    ("Mutual information", "", (("mutual_information", ""),)),
    ("Learning rate", "", (("lr", ""),)),
    ("Gradient norm", "", (("grad_norm", ""),)),
    ("Throughput", "tiles/s", (("tiles_per_s", ""),)),
    ("Waiting for data", "s a step", (("data_wait_s", ""),)),
)
_POINTS = 2000  # more than a panel has pixels; a longer run is drawn as means of equal stretches


def curves_figure(journal: str | Path, title: str = "") -> Figure:
    """Small multiples of a journal's training lines over optimizer steps: losses, rate, norm, throughput, data wait.

    Steps whose value was not finite are gaps.
    """
    from matplotlib.figure import Figure

    columns = columns_of(list(training_lines(journal)))
    panels = [panel for panel in PANELS if any(name in columns for name, _ in panel[2])]
    rows = max(1, -(-len(panels) // 2))
    figure = Figure(figsize=(11, 2.8 * rows), layout="constrained")
    if title:
        figure.suptitle(title)
    for place, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(rows, 2, place + 1), columns, panel)
    return figure


def columns_of(lines: Sequence[dict[str, Any]]) -> dict[str, npt.NDArray[np.float64]]:
    """Each number of the training lines as an array over lines; NaN where it is absent or was not finite."""
    names = {name for panel in PANELS for name, _ in panel[2]}
    present = {name for line in lines for name in names & line.keys()}
    columns = {
        name: np.array([float(line[name]) if is_number(line.get(name)) else np.nan for line in lines])
        for name in present
    }
    columns["step"] = np.array([float(line["step"]) for line in lines])
    return columns


def _draw_panel(axes: Any, columns: dict[str, npt.NDArray[np.float64]], panel: tuple[str, str, Any]) -> None:
    title, unit, curves = panel
    steps = thin(columns["step"])
    for name, label in curves:
        if name in columns:
            values = thin(columns[name])
            marker = "." if len(values) < 30 else None  # a point between two gaps has no line to show it
            axes.plot(steps, values, linewidth=1.2, label=label or None, marker=marker)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if any(label for name, label in curves if name in columns):
        axes.legend(fontsize=8, frameon=False)


def thin(values: npt.NDArray[np.float64], points: int = _POINTS) -> npt.NDArray[np.float64]:
    """At most about ``points`` values: means over equal stretches, of what in them is finite; NaN where nothing is."""
    stretch = -(-len(values) // points)
    if stretch <= 1:
        return values
    whole = values[: len(values) // stretch * stretch].reshape(-1, stretch)
    finite = np.isfinite(whole)
    counts = finite.sum(1)
    means = np.where(finite, whole, 0).sum(1) / np.maximum(counts, 1)
    return np.where(counts > 0, means, np.nan)


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
