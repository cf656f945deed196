"""Difference in accuracy between test sets, for the same classifiers.

Legend: S draws of labels, N and M test tiles of the two sets, G groups of both together, R resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.centers.resampling import NONE, Resampled
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Interval, Units, paired_difference

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
    """tile: the same tiles are in both sets, and are compared one by one; group: slides are resampled."""
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
        resampled = None if paired else _Pool(tiles[first].groups(), tiles[other].groups())
        for row in rows:
            if row.test != first:
                continue
            a_SN, b_SM = row.right_SN, place[row.features, row.classifier, row.budget, other].right_SN
            if paired:
                a_SN, b_SM = a_SN[:, here], b_SM[:, there]
                gain = paired_difference(a_SN, b_SM, units, resamples=1)
                interval, count = gain.interval, len(here)
            else:
                assert resampled is not None
                interval, count = resampled.interval(a_SN, b_SM), a_SN.shape[1] + b_SM.shape[1]
            a, b = float(a_SN.mean()), float(b_SM.mean())
            by: Literal["tile", "group"] = "tile" if paired else "group"
            found.append(Drop(row.features, row.classifier, row.budget, other, a, b, a - b, interval, by, count))
    return found


def same_tiles(a: TestTiles, b: TestTiles) -> tuple[list[int], list[int]]:
    """Rows of ``a`` and of ``b`` with the same key and class, pair by pair."""
    rows = {(key, label): row for row, (key, label) in enumerate(zip(b.keys, b.labels, strict=True))}
    both = enumerate(zip(a.keys, a.labels, strict=True))
    pairs = [(row, rows[tile]) for row, tile in both if tile in rows]
    return [row for row, _ in pairs], [row for _, row in pairs]


class _Pool:
    """Groups of two sets, resampled together: one that is in both is drawn for both at once."""

    def __init__(self, a: Sequence[str], b: Sequence[str]) -> None:
        names, unit = np.unique(np.asarray([*a, *b], str), return_inverse=True)
        self._a_N, self._b_M = unit[: len(a)], unit[len(a) :]
        in_a, in_b = np.isin(np.arange(len(names)), self._a_N), np.isin(np.arange(len(names)), self._b_M)
        self._few = min(in_a.sum(), in_b.sum()) < 2
        self._groups = Resampled(np.arange(len(names)), stratum_G=(in_a + 2 * in_b).astype(np.int64))

    def interval(self, a_SN: npt.NDArray[np.bool_], b_SM: npt.NDArray[np.bool_]) -> Interval:
        """95 % of the difference in mean, over groups and draws of labels."""
        if self._few:
            return NONE
        times_RG, draws = self._groups.times_RG, len(a_SN)
        generator = np.random.default_rng(1)
        weight_RS = generator.multinomial(draws, np.full(draws, 1 / draws), size=len(times_RG)) / draws
        means = []
        for right_SN, unit_N in ((a_SN, self._a_N), (b_SM, self._b_M)):
            groups = times_RG.shape[1]
            sum_GS = np.stack([np.bincount(unit_N, row, minlength=groups) for row in right_SN], axis=1)
            size_R = times_RG @ np.bincount(unit_N, minlength=groups)
            means.append((times_RG @ sum_GS) / size_R[:, None])
        found_R = ((means[0] - means[1]) * weight_RS).sum(axis=1)
        low, high = np.quantile(found_R[np.isfinite(found_R)], [0.025, 0.975])
        return float(low), float(high)
