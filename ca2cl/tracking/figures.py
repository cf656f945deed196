"""Figures of a run: training curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_number
from ca2cl.tracking.journal import training_lines, watch_lines
from ca2cl.tracking.running_means import Panel, smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS: tuple[Panel, ...] = (
    ("Learning rate", "", (("lr", ""),)),
    ("Gradient norm", "", (("grad_norm", ""),)),
    ("Throughput", "tiles/s", (("tiles_per_s", ""),)),
    ("Waiting for data", "s per step", (("data_wait_s", ""),)),
)
WATCH_PANELS: tuple[Panel, ...] = (
    ("Held-out accuracy", "", (("watch/knn", "k-NN"), ("watch/linear", "linear"))),
    ("Effective rank", "", (("watch/rank", ""),)),
    ("Uniformity", "", (("watch/uniformity", ""),)),
    ("Alignment", "", (("watch/alignment", ""),)),
    ("Distance of two tiles for the loss", "", (("watch/apart", ""),)),
    ("Share of the tiles in a centroid", "", (("watch/largest", "largest"), ("watch/smallest", "smallest"))),
)
"""Panels of the watch lines; a panel without data is left out."""
_POINTS = 2000  # more than a panel has pixels; a longer run is drawn as means of equal stretches


def curves_figure(
    journal: str | Path, terms: Sequence[Panel] = (), chance: Mapping[str, float] | None = None
) -> Figure:  # fmt: skip
    """Small multiples of a journal over optimizer steps: losses, watch, rate, norm, throughput, data wait.

    Steps whose value was not finite are gaps. Losses have their running mean over each step's value.

    Args:
        journal: its path.
        terms: panels of the losses, which are the method's.
        chance: values of terms at chance.
    """
    from matplotlib.figure import Figure

    trained, watched = (columns_of(list(lines(journal))) for lines in (training_lines, watch_lines))
    drawn = [*((trained, one) for one in terms), *((watched, one) for one in WATCH_PANELS)]
    drawn += [(trained, one) for one in PANELS]
    panels = [(columns, one) for columns, one in drawn if any(name in columns for name, _ in one[2])]
    rows = max(1, -(-len(panels) // 2))
    height = 2.8 * rows
    figure = Figure(figsize=(11, height))
    # margins in inches: a layout engine draws everything once more to find them
    figure.subplots_adjust(
        left=0.7 / 11, right=1 - 0.15 / 11, bottom=0.5 / height, top=1 - 0.35 / height, wspace=0.2, hspace=0.45
    )
    for place, (columns, panel) in enumerate(panels):
        axes = figure.add_subplot(rows, 2, place + 1)
        if panel in terms:
            _draw_means(axes, columns, panel, chance or {})
        _draw_panel(axes, columns, panel, faint=panel in terms)
    return figure


def columns_of(lines: Sequence[dict[str, Any]]) -> dict[str, npt.NDArray[np.float64]]:
    """Each number of training or watch lines as an array over lines; NaN where it is absent or was not finite."""
    present = {name for line in lines for name, value in line.items() if value is None or is_number(value)}
    columns = {
        name: np.array([float(line[name]) if is_number(line.get(name)) else np.nan for line in lines])
        for name in present
    }
    columns["step"] = np.array([float(line["step"]) for line in lines])
    return columns


def _draw_means(
    axes: Any, columns: dict[str, npt.NDArray[np.float64]], panel: Panel, chance: Mapping[str, float]
) -> None:  # fmt: skip
    """Running means, over the values of single steps, and lines at chance."""
    for number, (name, label) in enumerate(one for one in panel[2] if one[0] in columns):
        means, told = thin(smoothed(columns[name])), f"{label}, " if label else ""
        axes.plot(
            thin(columns["step"]), means, linewidth=1.6, color=f"C{number}", zorder=3, label=f"{told}running mean"
        )
        if name in chance:
            level = {"color": "0.35", "linewidth": 1.0, "linestyle": "--"}
            axes.axhline(chance[name], **level, label=f"{told}chance {chance[name]:.2f}")


def _draw_panel(
    axes: Any, columns: dict[str, npt.NDArray[np.float64]], panel: Panel, *, faint: bool
) -> None:  # fmt: skip
    title, unit, curves = panel
    steps = thin(columns["step"])
    for number, (name, label) in enumerate(one for one in curves if one[0] in columns):
        values = thin(columns[name])
        marker = "." if len(values) < 30 else None  # a point between two gaps has no line to show it
        style = {"linewidth": 0.8, "alpha": 0.35} if faint else {"linewidth": 1.2, "label": label or None}
        axes.plot(steps, values, marker=marker, color=f"C{number}", **style)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if faint or any(label for name, label in curves if name in columns):
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
