"""Plot of accuracy on shifted tiles."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ca2cl.common.files import write_atomic
from ca2cl.evaluation.centers.shifts import FAMILIES

_REMEDY = "free some space, or give a file in a folder you can write"


def draw_shifts(path: Path, shifts: Mapping[str, Any]) -> None:
    """A PNG with a panel for each family: accuracy with its 95 % interval by strength, a line for each encoder.

    Args:
        path: of the PNG.
        shifts: as the JSON has them.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(FAMILIES), 3.6), layout="constrained")
    panels = figure.subplots(1, len(FAMILIES), sharey=True)
    features = list(dict.fromkeys(one["features"] for one in shifts["scores"]))
    for axes, family in zip(panels, FAMILIES, strict=True):
        for number, name in enumerate(features):
            line = [one for one in shifts["scores"] if one["features"] == name]
            line = sorted((one for one in line if one["family"] in ("clean", family)), key=lambda one: one["strength"])
            x = [one["strength"] + 0.04 * (number - len(features) / 2) for one in line]
            y = [one["accuracy"] for one in line]
            bars = [[abs(one["accuracy"] - one["accuracy_interval_95"][end]) for one in line] for end in (0, 1)]
            style = {"linewidth": 2.0} if number == 0 else {"linewidth": 1.0, "linestyle": "--"}
            axes.errorbar(x, y, yerr=bars, marker="o", markersize=3, capsize=2, label=name, **style)
        axes.set_xticks(range(4), ["clean", "1", "2", "3"])
        axes.set(title=family, xlabel="strength")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel(f"top-1 accuracy, {shifts['classifier']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(features), 5))
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    write_atomic(path, drawn.getvalue(), _REMEDY)
