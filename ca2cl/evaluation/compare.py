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


def differences(
    first: str, compared: Sequence[Comparison], *, name_tests: bool = False, name_classifiers: bool = True
) -> str:
    """A line for each, under one that says what p is; empty where there is nothing to compare with.

    Args:
        first: name of the first features.
        compared: the comparisons.
        name_tests: name the test sets, where there are several.
        name_classifiers: name the classifiers.
    """
    if not compared:
        return ""
    holm = f", corrected by Holm for all {len(compared)} of them" if len(compared) > 1 else ""
    lines = [f"differences with 95 %, and p by sign flips{holm}"]
    for c in compared:
        names = [*([c.classifier] if name_classifiers else []), *([c.test] if name_tests else [])]
        where = "".join(f"{name}, " for name in names)
        low, high = c.difference.interval
        lines.append(
            f"{first} less {c.against}, {where}{describe_budget(c.budget)} labels: {c.difference.mean:+.3f} "
            f"[{low:+.3f}, {high:+.3f}]; p = {c.difference.p_holm:.2g}"
        )
    return "\n" + "\n".join(lines) + "\n"
