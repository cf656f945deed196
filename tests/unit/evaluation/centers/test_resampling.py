"""Intervals over slides, as loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from ca2cl.evaluation.centers.resampling import balanced_interval, drawn, median_interval, share_interval
from ca2cl.evaluation.statistics import Units

NUMBERS = np.array([0] * 4 + [1] * 3 + [2] + [3] * 5 + [4] * 2)
UNITS = Units(NUMBERS, known=True)
GENERATOR = np.random.default_rng(0)
VALUES, PART = GENERATOR.normal(size=15), GENERATOR.random(15)
WHOLE = PART + GENERATOR.random(15)


def test_a_share_s_interval_is_a_jackknife_on_the_logit_scale() -> None:
    share = PART.sum() / WHOLE.sum()
    left = [PART[unit != NUMBERS].sum() / WHOLE[unit != NUMBERS].sum() for unit in range(5)]
    variance = 4 / 5 * sum((one - share) ** 2 for one in left)
    effective = WHOLE.sum() ** 2 / sum(WHOLE[unit == NUMBERS].sum() ** 2 for unit in range(5))
    half = t.ppf(0.975, effective - 1) * math.sqrt(variance) / (share * (1 - share))
    expected = [1 / (1 + math.exp(-(math.log(share / (1 - share)) + sign * half))) for sign in (-1, 1)]
    assert share_interval(PART, WHOLE, UNITS) == pytest.approx(expected)


def test_a_balanced_accuracy_weighs_targets_alike() -> None:
    right, target = np.array([True] * 8 + [False, True] * 3 + [False]), NUMBERS % 2
    weight = 1 / np.bincount(target)[target]  # of a tile: the same mean as one share
    low, high = balanced_interval(right, target, UNITS)
    assert low < float((weight * right).sum() / 2) < high
    many = Units(np.arange(1500), known=False)
    wide = np.array(balanced_interval(np.tile(right, 100), np.tile(target, 100), many))
    assert wide[1] - wide[0] < (high - low) / 4


def test_a_median_s_interval_is_that_of_the_samples() -> None:
    times = drawn(np.random.default_rng(0), 60, 5).tolist()
    known = np.where(np.arange(15) % 4 == 1, np.nan, VALUES)
    medians = []
    for one in times:
        values = sorted(
            v for v, unit in zip(known, NUMBERS, strict=True) for _ in range(one[unit]) if not math.isnan(v)
        )
        medians += [values[(len(values) - 1) // 2]] if values else []
    low, high = np.quantile(medians, [0.025, 0.975])
    assert median_interval(known, UNITS, resamples=60) == pytest.approx((low, high))


def test_draws_are_with_replacement() -> None:
    times = drawn(np.random.default_rng(1), 2000, 5)
    assert (times.sum(axis=1) == 5).all() and times.mean(axis=0) == pytest.approx(1, abs=0.1)
    assert times.var(axis=0) == pytest.approx(4 / 5, abs=0.1)


def test_one_group_has_no_interval() -> None:
    alone = Units(np.zeros(15, np.int64), known=True)
    assert all(map(math.isnan, share_interval(PART, WHOLE, alone)))
    assert all(map(math.isnan, median_interval(VALUES, alone)))
