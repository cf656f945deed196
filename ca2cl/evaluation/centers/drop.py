"""Difference in accuracy between test sets, for the same classifiers.

Legend: S draws of labels, N and M test tiles of the two sets, G groups of both together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.centers.resampling import NONE
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Interval, Units, paired_difference, ratio_score

_SHARED = 0.5
"""Share of the smaller set's tiles that must be in the other one, by key and class, to compare tile by tile."""


@dataclass(frozen=True)
class TestTiles:
    """Keys, classes and slides of a test set's tiles, in the order of its rows."""

    __test__ = False  # of pytest

    keys: Sequence[str]
    labels: Sequence[int]
    slides: Sequence[str] | None

    def groups(self) -> list[str]:
        """Slide of every tile; its key where none is known."""
        return list(self.slides) if self.slides is not None else [f"tile {key}" for key in self.keys]


@dataclass(frozen=True)
class Drop:
    """Accuracy on the first test set less that on another one."""

    features: str
    classifier: str
    budget: float
    test: str
    """The other one."""
    accuracy: float
    """On the first set."""
    other_accuracy: float
    mean: float
    interval_95: Interval
    by: Literal["tile", "group"]
    """tile: tiles of the same key are in both sets, and are compared one by one; group: slides of both sets vary."""
    tiles: int
    """Pairs, or tiles of both sets."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def drops(rows: Sequence[Row], tiles: dict[str, TestTiles]) -> list[Drop]:
    """The drop of every row of the first test set to each other set; empty with a single one.

    Args:
        rows: of all test sets.
        tiles: of each test set, the first one's first.
    """
    first, *others = tiles
    place = {(row.features, row.classifier, row.budget, row.test): row for row in rows}
    found = []
    for other in others:
        here, there = same_tiles(tiles[first], tiles[other])
        paired = len(here) >= _SHARED * min(len(tiles[first].keys), len(tiles[other].keys))
        slides = tiles[first].slides
        units = Units.of(None if slides is None else [slides[row] for row in here], len(here)) if paired else None
        groups = _Groups(tiles[first].groups(), tiles[other].groups())
        for row in rows:
            if row.test != first:
                continue
            a_SN, b_SM = row.right_SN, place[row.features, row.classifier, row.budget, other].right_SN
            if paired:
                a_SN, b_SM = a_SN[:, here], b_SM[:, there]
                interval = paired_difference(a_SN, b_SM, units, resamples=1).interval
            else:
                interval = groups.interval(a_SN, b_SM)
            count = len(here) if paired else a_SN.shape[1] + b_SM.shape[1]
            a, b = float(a_SN.mean()), float(b_SM.mean())
            by: Literal["tile", "group"] = "tile" if paired else "group"
            found.append(Drop(row.features, row.classifier, row.budget, other, a, b, a - b, interval, by, count))
    return found


def same_tiles(a: TestTiles, b: TestTiles) -> tuple[list[int], list[int]]:
    """Rows of ``a`` and of ``b`` with the same key, class and (where both sets know them) slide, pair by pair."""
    both = a.slides is not None and b.slides is not None
    names_a, names_b = (
        zip(one.keys, one.labels, one.slides if both and one.slides else one.labels, strict=True) for one in (a, b)
    )
    rows = {name: row for row, name in enumerate(names_b)}
    pairs = [(row, rows[name]) for row, name in enumerate(names_a) if name in rows]
    return [row for row, _ in pairs], [row for _, row in pairs]


class _Groups:
    """Slides of two sets; one that is in both is left out of both at once."""

    def __init__(self, a: Sequence[str], b: Sequence[str]) -> None:
        names, unit = np.unique(np.asarray([*a, *b], str), return_inverse=True)
        self._units, self._count = (unit[: len(a)], unit[len(a) :]), len(names)

    def interval(self, a_SN: npt.NDArray[np.bool_], b_SM: npt.NDArray[np.bool_]) -> Interval:
        """95 % of the difference in mean, for other slides and other draws of labels; ``nan`` for a single slide.

        Student's t with the jackknife's variance over slides, those of both sets added, and the freedom of the set with
        fewer (effective) slides; the variance of draws is added in squares (``statistics.bootstrap_interval``).
        """
        from scipy.stats import t

        scores = []
        for right_SN, unit_N in zip((a_SN, b_SM), self._units, strict=True):
            sums_SG = np.stack([np.bincount(unit_N, row, minlength=self._count) for row in right_SN]).astype(np.float64)
            size_G = np.bincount(unit_N, minlength=self._count).astype(np.float64)
            scores.append(ratio_score(sums_SG[..., None], np.broadcast_to(size_G, sums_SG.shape)[..., None]))
        slides = [int((score.weight_G > 0).sum()) for score in scores]
        if min(slides) < 2:
            return NONE
        moved = [score.moved_SG.mean(axis=0) * ((n - 1) / n) ** 0.5 for score, n in zip(scores, slides, strict=True)]
        freedom = min(1 / float(np.square(score.weight_G).sum()) - 1 for score in scores)
        gain_S = scores[0].value_S - scores[1].value_S
        half = float(t.ppf(0.975, max(1.0, freedom))) ** 2 * float(np.square(moved[0] - moved[1]).sum())
        if len(gain_S) > 1:
            half += float(t.ppf(0.975, len(gain_S) - 1)) ** 2 * float(gain_S.var(ddof=1)) / len(gain_S)
        mean = float(gain_S.mean())
        return max(-1.0, mean - half**0.5), min(1.0, mean + half**0.5)
