"""Scores of recipes over training seeds, and their differences.

A value is one training seed's score: the mean over the probe's draws of labels, which are the same for all runs. So
the spread is that of training: initial weights, order of tiles, views. Test tiles and draws are fixed, and intervals
say nothing about other ones; each run's probe.json does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.statistics import Interval, holm_p
from ca2cl.study.jobs import Job, probe_results

SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")


@dataclass(frozen=True)
class Row:
    """Scores of a recipe, or of a floor, by one classifier at one label budget on one test set."""

    name: str
    floor: bool
    classifier: str
    budget: float
    labelled: int
    test: str
    tokens: str
    """Tokens of a ViT as the probe names them; empty for the encoder's own pooling."""
    seeds: list[int]
    """Training seeds."""
    scores: dict[str, list[float]]
    """Value of every training seed. A floor has one."""

    @property
    def place(self) -> tuple[str, str, float, str]:
        """What rows that are compared have in common."""
        return self.tokens, self.classifier, self.budget, self.test

    def mean_sd(self, score: str) -> tuple[float, float]:
        """Mean and sample standard deviation over training seeds; the latter is nan for one seed."""
        values = np.asarray(self.scores[score])
        return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        spread = {score: self.mean_sd(score) for score in self.scores}
        means = {score: mean for score, (mean, _) in spread.items()}
        return {**asdict(self), "mean": means, "sd_of_seeds": {score: sd for score, (_, sd) in spread.items()}}


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of the first recipe less that of another one."""

    first: str
    against: str
    tokens: str
    classifier: str
    budget: float
    test: str
    mean: float
    interval: Interval
    """95 % interval by Welch's t; nan with one seed."""
    p: float
    p_holm: float
    """Corrected for all differences of this classifier."""


def read_rows(jobs: Sequence[Job]) -> list[Row]:
    """The rows of all finished jobs: recipes in order, then floors."""
    rows: dict[tuple[Any, ...], Row] = {}
    for job in jobs:
        content = probe_results(job.probe)
        for test, held in content["tests"].items() if content is not None else ():
            for result in held["results"]:
                row = _empty(job, test, result)
                row = rows.setdefault((row.name, row.floor, *row.place), row)
                row.seeds.append(job.seed)
                for score in SCORES:
                    value = result["mean"].get(score)
                    row.scores[score].append(math.nan if value is None else float(value))
    order = list(dict.fromkeys(job.recipe for job in jobs))
    return sorted(rows.values(), key=lambda row: (row.floor, 0 if row.floor else order.index(row.name)))


def _empty(job: Job, test: str, result: Mapping[str, Any]) -> Row:
    """The row that a probe's result belongs to, without values."""
    features, tokens = str(result["features"]), ""
    if features.endswith(")"):
        features, _, tokens = features[:-1].rpartition(" (")
    own = features == ENCODER
    return Row(
        name=job.recipe if own else features,
        floor=not own,
        classifier=str(result["classifier"]),
        budget=float(result["budget"]),
        labelled=int(result["labelled"]),
        test=test,
        tokens=tokens,
        seeds=[],
        scores={score: [] for score in SCORES},
    )


def compare(rows: Sequence[Row], first: str) -> list[Difference]:
    """The accuracy of the recipe ``first`` less every other recipe's, with Holm's correction for each classifier.

    Runs of one seed begin with the same weights and see tiles in the same order, but different losses soon part them.
    So seeds are taken as independent (Welch's t). If something of the pairing is left, the intervals are too wide, not
    too narrow; pairs of 3 seeds would leave 2 degrees of freedom.
    """
    ours = {row.place: row for row in rows if row.name == first and not row.floor}
    found = [
        _difference(ours[row.place], row)
        for row in rows
        if not row.floor and row.name != first and row.place in ours
    ]  # fmt: skip
    for classifier in dict.fromkeys(difference.classifier for difference in found):
        numbers = [number for number, one in enumerate(found) if one.classifier == classifier]
        for number, p in zip(numbers, holm_p([found[number].p for number in numbers]), strict=True):
            found[number] = replace(found[number], p_holm=p)
    return found


def _difference(ours: Row, other: Row) -> Difference:
    a, b = ours.scores["accuracy"], other.scores["accuracy"]
    interval, p = welch(a, b)
    mean = float(np.mean(a) - np.mean(b))
    where = (ours.tokens, ours.classifier, ours.budget, ours.test)
    return Difference(ours.name, other.name, *where, mean, interval, p, p)


def welch(a: Sequence[float], b: Sequence[float]) -> tuple[Interval, float]:
    """95 % interval of mean(a) - mean(b), and two-sided p, by Welch's t (1947). nan and 1 for fewer than two of each,
    or if none of them varies."""
    from scipy.stats import ttest_ind

    if min(len(a), len(b)) < 2 or np.ptp(a) + np.ptp(b) == 0:
        return (math.nan, math.nan), 1.0
    tested = ttest_ind(a, b, equal_var=False)
    low, high = tested.confidence_interval(0.95)
    return (float(low), float(high)), float(tested.pvalue)


def by_primary(rows: Sequence[Row], differences: Sequence[Difference]) -> list[Difference]:
    """The differences that are printed: those of the first classifier."""
    return [one for one in differences if one.classifier == rows[0].classifier]


def best_floor(rows: Sequence[Row], place: tuple[str, str, float, str]) -> Mapping[str, float]:
    """The accuracy of the best floor at a place, by its name; empty without floors."""
    there = {row.name: row.mean_sd("accuracy")[0] for row in rows if row.floor and row.place == place}
    best = max(there, key=lambda name: there[name], default=None)
    return {best: there[best]} if best is not None else {}
