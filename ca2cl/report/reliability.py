"""Reliability diagrams as inline SVG that follows the page's theme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ca2cl.evaluation.calibration.reliability import Bin
from ca2cl.evaluation.result import Row

SIDE, EDGE = 200, 28
"""Of a diagram and its margin, in its own units."""


@dataclass(frozen=True)
class Points:
    """One line: accuracy against confidence, bin by bin."""

    label: str
    path: str
    dots: list[tuple[float, float]]
    bands: list[tuple[float, float, float]]
    """x and both ends of every 95 % band."""


@dataclass(frozen=True)
class Diagram:
    """Accuracy against confidence of one classifier, raw and scaled."""

    title: str
    lines: list[Points]
    ticks: list[tuple[float, float, str]]
    """x, y and value of the ticks of both axes."""


def diagrams(rows: Sequence[Row]) -> list[Diagram]:
    """A diagram for each row whose calibration is known."""
    found = []
    for row in rows:
        if row.calibration is None or not row.calibration.raw_bins:
            continue
        named = (("raw", row.calibration.raw_bins), ("scaled", row.calibration.scaled_bins))
        title = ", ".join(word for word in (row.features, row.classifier, row.test) if word)
        ticks = [(*_place(value, value), f"{value:g}") for value in (0.0, 0.5, 1.0)]
        found.append(Diagram(title, [_points(label, bins) for label, bins in named if bins], ticks))
    return found


def _points(label: str, bins: Sequence[Bin]) -> Points:
    dots = [_place(one.confidence, one.accuracy) for one in bins]
    bands = [
        (_place(one.confidence, 0)[0], _place(0, one.low)[1], _place(0, one.high)[1])
        for one in bins
        if not math.isnan(one.low)
    ]
    return Points(label, "M" + "L".join(f"{x} {y}" for x, y in dots), dots, bands)


def _place(confidence: float, accuracy: float) -> tuple[float, float]:
    inner = SIDE - EDGE - 8
    return round(EDGE + confidence * inner, 1), round(8 + (1 - accuracy) * inner, 1)
