"""Reliability diagram: accuracy against confidence.

Legend: N tiles, K classes, M bins.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ca2cl.evaluation.calibration.probability_errors import BINS


@dataclass(frozen=True)
class Bin:
    """Predictions whose confidence lies in one of 15 intervals of equal width."""

    number: int
    """Its interval is (number / 15, (number + 1) / 15]."""
    count: int
    """Predictions, over all draws of labels."""
    confidence: float
    """Their mean."""
    accuracy: float
    low: float
    """Lower end of the accuracy's 95 % interval by whole slides; ``nan`` for a single slide."""
    high: float


def draw_reliability(panels: Sequence[tuple[str, Sequence[Bin]]], title: str) -> bytes:
    """A PNG: for every panel accuracy with 95 % bands against confidence, over the share of predictions in each bin.

    Args:
        panels: name and bins, such as of raw and of scaled probabilities.
        title: above it.
    """
    from matplotlib.figure import Figure

    width = 4.6 * len(panels)
    figure = Figure(figsize=(width, 5.2), layout="constrained")
    figure.suptitle(textwrap.fill(title, int(12 * width)), fontsize=10)  # 12 letters an inch
    axes = figure.subplots(2, len(panels), sharex=True, squeeze=False, gridspec_kw={"height_ratios": [3, 1]})
    for (upper, lower), (name, bins) in zip(axes.T, panels, strict=True):
        _draw_panel(upper, lower, bins)
        upper.set_title(name, fontsize=10)
        lower.set_xlabel("confidence")
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("predictions, %")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120)
    return drawn.getvalue()


def _draw_panel(upper: Any, lower: Any, bins: Sequence[Bin]) -> None:
    upper.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    middle = [(one.number + 0.5) / BINS for one in bins]
    accuracy = np.array([one.accuracy for one in bins])
    upper.bar(middle, accuracy, 0.92 / BINS, color="C0", alpha=0.35)
    ends = np.nan_to_num(np.array([[one.low, one.high] for one in bins]), nan=0.0).reshape(-1, 2)
    known = np.array([np.isfinite(one.low) for one in bins], bool)
    below, above = np.maximum(accuracy - ends[:, 0], 0), np.maximum(ends[:, 1] - accuracy, 0)
    upper.errorbar(
        [one.confidence for one in bins], accuracy, np.where(known, [below, above], 0),
        fmt="o", markersize=4, color="C0", capsize=2, linewidth=1, label="accuracy with 95 %",
    )  # fmt: skip
    upper.set(xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(fontsize=7, loc="upper left")
    total = max(1, sum(one.count for one in bins))
    shares = [100 * one.count / total for one in bins]
    lower.bar(middle, shares, 0.92 / BINS, color="C0")
    lower.set_ylim(0, 1.5 * max(shares, default=1))
    for x, share, one in zip(middle, shares, bins, strict=True):
        lower.text(x, share, f" {one.count}", ha="center", va="bottom", fontsize=6, rotation=90)
