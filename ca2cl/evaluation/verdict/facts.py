"""Accuracies and differences of a result table, as the verdict needs them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ca2cl.evaluation.compare import Comparison
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Interval

LEVEL = 0.05
Says = Literal["ahead", "behind", "higher", "lower", "level"]


class Column(NamedTuple):
    """A column of the compact table: a classifier at a label budget."""

    classifier: str
    budget: float


@dataclass(frozen=True)
class Level:
    """Accuracy of the first features in one column, with its 95 % interval."""

    column: Column
    accuracy: float
    interval: Interval


@dataclass(frozen=True)
class Gap:
    """Accuracy of the first features less that of others in one column."""

    against: str
    column: Column
    difference: float
    interval: Interval
    """95 %, of this difference alone."""
    p: float
    """Corrected by Holm for all differences of the probe."""

    @property
    def says(self) -> Says:
        """ahead or behind if the corrected p is below .05 and the interval excludes 0.

        Otherwise higher or lower if at least the interval excludes 0; level if it does not, or is not known.
        """
        low, high = self.interval
        if low > 0:
            return "ahead" if self.p < LEVEL else "higher"
        if high < 0:
            return "behind" if self.p < LEVEL else "lower"
        return "level"


@dataclass(frozen=True)
class Facts:
    """Accuracies of the first features on one test set, and how others compare."""

    levels: tuple[Level, ...]
    """One a column, in the order of the table."""
    gaps: tuple[Gap, ...]
    chance: float
    """Accuracy of always naming the most frequent class of the test tiles."""
    leak: bool = False
    """The test set shares tiles or slides with what an encoder or a classifier was trained on."""
    comparable: bool = True
    """False for a protocol that is for comparison with published tables alone."""


def facts_of(rows: Sequence[Row], compared: Iterable[Comparison], *, leak: bool, comparable: bool) -> Facts:
    """Facts of one test set.

    Args:
        rows: of this test set; the first row's features are those that the verdict is about.
        compared: the differences, those of other test sets are left out.
        leak: whether anything is shared with training data.
        comparable: whether the protocol allows to compare encoders.
    """
    own = [row for row in rows if row.features == rows[0].features]
    return Facts(
        levels=tuple(Level(Column(r.classifier, r.budget), r.mean_sd("accuracy")[0], r.interval) for r in own),
        gaps=tuple(
            Gap(
                c.against, Column(c.classifier, c.budget), c.difference.mean, c.difference.interval, c.difference.p_holm
            )
            for c in compared
            if c.test == rows[0].test
        ),
        chance=chance_level(rows[0]),
        leak=leak,
        comparable=comparable,
    )


def chance_level(row: Row) -> float:
    """Share of the most frequent class among the test tiles: the accuracy of naming it always."""
    tiles_K = row.per_seed[0].confusion.sum(axis=1)
    return float(tiles_K.max() / tiles_K.sum())


def above_chance(level: Level, chance: float) -> bool:
    """True if the whole interval of the accuracy lies above chance."""
    return not math.isnan(level.interval[0]) and level.interval[0] > chance
