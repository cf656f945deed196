"""Resampled slides, as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ca2cl.evaluation.centers.resampling import Resampled

UNITS = np.array([0] * 4 + [1] * 3 + [2] + [3] * 5 + [4] * 2)
GENERATOR = np.random.default_rng(0)
VALUES, WHOLE = GENERATOR.normal(size=15), GENERATOR.integers(1, 5, 15)


def samples(resampled: Resampled) -> list[list[int]]:
    """Rows of the tiles of each sample, once for each time that their slide was drawn."""
    return [
        [row for row, unit in enumerate(UNITS) for _ in range(times[unit])] for times in resampled.times_RG.tolist()
    ]


def ends(values: list[float]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def test_ratios_medians_and_balanced_accuracies_are_those_of_the_samples() -> None:
    resampled = Resampled(UNITS, resamples=60)
    rows = samples(resampled)
    assert resampled.ratio(VALUES, WHOLE) == pytest.approx(ends([VALUES[r].sum() / WHOLE[r].sum() for r in rows]))
    lower = [sorted(VALUES[r])[(len(r) - 1) // 2] for r in rows]
    assert resampled.median(VALUES) == pytest.approx(ends(lower))
    known = np.where(np.arange(15) % 4 == 1, np.nan, VALUES)
    kept = [sorted(v for v in known[r] if not math.isnan(v)) for r in rows]
    assert resampled.median(known) == pytest.approx(ends([v[(len(v) - 1) // 2] for v in kept if v]))
    right, target = VALUES > 0, UNITS // 2
    recalls = [[right[[i for i in r if target[i] == t]].mean() for t in sorted(set(target[r]))] for r in rows]
    assert resampled.balanced(right, target) == pytest.approx(ends([float(np.mean(one)) for one in recalls]))


def test_groups_are_drawn_from_within_their_stratum() -> None:
    strata = np.array([0, 0, 1, 1, 1])
    times = Resampled(UNITS, stratum_G=strata).times_RG
    assert (times[:, :2].sum(axis=1) == 2).all() and (times[:, 2:].sum(axis=1) == 3).all()
    assert times.mean(axis=0) == pytest.approx(1, abs=0.1) and times.var(axis=0) == pytest.approx(
        [1 / 2, 1 / 2, 2 / 3, 2 / 3, 2 / 3], abs=0.1
    )
    assert (times == Resampled(UNITS, stratum_G=strata).times_RG).all()


def test_one_group_has_no_interval() -> None:
    assert all(map(math.isnan, Resampled(np.zeros(5, np.int64)).ratio(np.ones(5), np.ones(5))))
