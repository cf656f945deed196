"""Paired comparisons of encoders on the same draws and test tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import describe_budget
from ca2cl.evaluation.statistics import Difference, holm, paired_difference


@dataclass(frozen=True)
class Comparison:
    """The first features of a table less others, by one classifier at one budget on one test set."""

    against: str
    classifier: str
    budget: float
    test: str
    difference: Difference

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        where = {"against": self.against, "classifier": self.classifier, "budget": self.budget}
        return {**where, **asdict(self.difference)}


def compare_with_first(rows: Sequence[Row]) -> list[Comparison]:
    """Every row of other features beside the first features' row of the same classifier, budget and test set; p is
    corrected for all of them."""
    first = rows[0].features
    ours = {(row.classifier, row.budget, row.test): row for row in rows if row.features == first}
    compared = [
        Comparison(
            row.features,
            row.classifier,
            row.budget,
            row.test,
            paired_difference(ours[row.classifier, row.budget, row.test].right_SN, row.right_SN, row.units),
        )
        for row in rows
        if row.features != first
    ]
    corrected = holm([comparison.difference for comparison in compared])
    return [replace(c, difference=difference) for c, difference in zip(compared, corrected, strict=True)]


def describe_difference(first: str, against: str, where: str, budget: float, difference: Difference) -> str:
    """One line for people; ``where`` is what else tells it from other lines, or nothing.

    Args:
        first: name of the first features.
        against: name of the others.
        where: what else tells it from other lines, or nothing.
        budget: label budget.
        difference: first less others.
    """
    low, high = difference.interval
    return (
        f"{first} less {against}, {where}{describe_budget(budget)} labels: {difference.mean:+.3f} "
        f"[{low:+.3f}, {high:+.3f}]; p = {difference.p_holm:.2g}"
    )


def differences(first: str, compared: Sequence[Comparison], *, name_tests: bool) -> str:
    """A line for each, after an empty one; nothing where there is nothing to compare with."""
    lines = [
        describe_difference(
            first, c.against, f"{c.classifier}, {f'{c.test}, ' if name_tests else ''}", c.budget, c.difference
        )
        for c in compared
    ]
    return under_heading(lines)


def under_heading(lines: Sequence[str]) -> str:
    """Lines of ``describe_difference`` under one that says what p is; nothing where there are none."""
    if not lines:
        return ""
    holm = f", corrected by Holm for all {len(lines)} of them" if len(lines) > 1 else ""
    heading = f"differences with 95 %, and p by sign flips{holm}"
    return "\n" + "\n".join([heading, *lines]) + "\n"
