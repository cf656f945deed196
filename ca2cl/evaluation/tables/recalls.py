"""Recall by class, as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ca2cl.common.tables import aligned
from ca2cl.evaluation.metrics import ClassRecall
from ca2cl.evaluation.report import describe_interval
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import describe_budget


def recall_heads(rows: Sequence[Row]) -> list[str]:
    """Headings of the recall table's columns.

    Args:
        rows: of one test set and one budget.
    """
    return ["recall of", "tiles", *(["slides"] if _by_slides(rows) else []), *(row.classifier for row in rows)]


def _by_slides(rows: Sequence[Row]) -> bool:
    """True if units of several tiles were resampled."""
    return any(one.units != one.tiles for one in rows[0].recalls)


def recall_cells(rows: Sequence[Row], classes: Sequence[str]) -> list[list[str]]:
    """Cells of the recall table: for every class its tiles, its slides, and a recall with interval for each row.

    Args:
        rows: of one test set and one budget.
        classes: names of the classes.
    """
    by_slides = _by_slides(rows)
    return [
        [name, str(of[0].tiles), *([str(of[0].units)] if by_slides else []), *(describe_recall(one) for one in of)]
        for name, of in zip(classes, zip(*(row.recalls for row in rows), strict=True), strict=True)
    ]


def describe_recall(found: ClassRecall) -> str:
    """Recall with its interval."""
    if math.isnan(found.recall):
        return "no tiles"
    return f"{found.recall:.3f} {describe_interval(found.interval)}"


def recall_table(rows: Sequence[Row], classes: Sequence[str]) -> str:
    """Recall by class of the first features with the most labels, for every classifier; a table for each test set.

    Args:
        rows: the result table.
        classes: names of the classes.
    """
    text = ""
    for test in dict.fromkeys(row.test for row in rows):
        ours = [row for row in rows if (row.features, row.test) == (rows[0].features, test)]
        shown = [row for row in ours if row.budget == ours[-1].budget and row.recalls]
        if shown:
            where = f", {shown[0].features}, {describe_budget(shown[0].budget)} labels" + (f", {test}" if test else "")
            text += f"\nrecall by class with 95 %{where}\n"
            text += aligned(recall_heads(shown), recall_cells(shown, classes))
    return text
