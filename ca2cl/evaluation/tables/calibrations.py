"""Calibration of a result table's rows: table and figure."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from ca2cl.common.files import write_atomic
from ca2cl.common.tables import aligned
from ca2cl.evaluation.calibration.reliability import draw_reliability
from ca2cl.evaluation.calibration.summary import SCALED
from ca2cl.evaluation.report import REMEDY, describe_interval
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import describe_budget

_ERRORS = {"calibration_error": "ECE", "brier": "Brier", "log_loss": "log-loss"}
CALIBRATION_NOTE = (
    "ECE over 15 bins of equal width, Brier score summed over classes; raw -> with logits divided by T, which was "
    "chosen on held-out labelled tiles"
)
SAME_SLIDES_NOTE = (
    "T was chosen on single tiles, since the training shards name no slides: if slides have several tiles, it is that "
    "of slides that were trained on, and may make predictions for other slides too sure"
)


def calibration_heads(several: bool = False) -> list[str]:
    """Headings of the calibration table's columns.

    Args:
        several: whether there is more than one test set.
    """
    return ["features", "classifier", "labels", *(["test"] if several else []), "T", *_ERRORS.values(), "95 % of Brier"]


def calibration_cells(row: Row, several: bool = False) -> list[str]:
    """Cells of a row of the calibration table, under ``calibration_heads``."""
    what = [row.features, row.classifier, describe_budget(row.budget), *([row.test] if several else [])]
    errors = row.calibration.errors() if row.calibration else {}
    numbers = []
    for name in _ERRORS:
        means = [f"{np.mean(errors[one]):.3f}" for one in (name, SCALED + name) if one in errors]
        numbers.append(" -> ".join(means))
    temperature = f"{np.mean(errors['temperature']):.2f}" if "temperature" in errors else "-"
    low, high = row.intervals.get(SCALED + "brier", row.intervals.get("brier", (math.nan, math.nan)))
    return [*what, temperature, *numbers, describe_interval((low, high))]


def calibrated_rows(rows: Sequence[Row], own: Container[str]) -> list[Row]:
    """The rows of the calibration table: all of these features, and of others those at the largest budget.

    Args:
        rows: the result table.
        own: features of the encoder.
    """
    largest = {row.features: row.budget for row in rows}
    return [row for row in rows if row.calibration and (row.features in own or row.budget == largest[row.features])]


def calibration_table(rows: Sequence[Row], own: Container[str], by_slides: bool) -> str:
    """The calibration of some rows as aligned text, empty where it is not known.

    Args:
        rows: the result table.
        own: features of the encoder.
        by_slides: whether whole slides were held out to choose a temperature.
    """
    several, shown = len({row.test for row in rows}) > 1, calibrated_rows(rows, own)
    if not shown:
        return ""
    text = aligned(calibration_heads(several), [calibration_cells(row, several) for row in shown])
    text = f"\ncalibration: {textwrap.fill(CALIBRATION_NOTE, 100)}\n{text}"
    warn = not by_slides and any(row.calibration and row.calibration.scaled for row in shown)
    return f"{text}{textwrap.fill(SAME_SLIDES_NOTE, 100)}\n" if warn else text


def draw_calibration(path: Path, row: Row, title: str) -> bool:
    """A PNG of a row's reliability diagrams, raw and scaled; False where its calibration is not known.

    Args:
        path: of the PNG.
        row: the row.
        title: above it.
    """
    found = row.calibration
    if found is None:
        return False
    panels = [("raw", found.raw_bins)]
    if found.scaled:
        panels.append((f"scaled, T = {np.mean(found.temperatures):.2f}", found.scaled_bins))
    write_atomic(path, draw_reliability(panels, title), REMEDY)
    return True
