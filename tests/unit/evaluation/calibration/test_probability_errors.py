"""Errors of probabilities: against loops, scikit-learn, and classifiers whose calibration is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from ca2cl.evaluation.calibration.probability_errors import (
    BINS,
    brier_scores,
    calibration_errors,
    debiased_error,
    equal_mass_bins,
    equal_width_bins,
    expected_calibration_error,
    log_losses,
)
from ca2cl.evaluation.result import reliability
from ca2cl.evaluation.statistics import Units


def softmax(logits: np.ndarray) -> np.ndarray:
    odds = np.exp(logits - logits.max(1, keepdims=True))
    return odds / odds.sum(1, keepdims=True)


def calibrated(tiles: int, classes: int = 4, seed: int = 0, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Labels that are drawn by the probabilities themselves."""
    generator = np.random.default_rng(seed)
    p = softmax(spread * generator.standard_normal((tiles, classes)))
    labels = (generator.random(tiles)[:, None] > p.cumsum(1)[:, :-1]).sum(1)
    return labels, p


CASES = st.integers(1, 60).flatmap(
    lambda tiles: st.tuples(
        arrays(np.int64, tiles, elements=st.integers(0, 2)),
        arrays(np.float64, (tiles, 3), elements=st.floats(-30, 30, width=16)),
    )
)


@given(CASES)
@settings(max_examples=60, deadline=None)
def test_errors_are_those_of_a_loop(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, logits = case
    p = softmax(logits)
    tiles = len(labels)
    brier = [sum((p[n, k] - (k == labels[n])) ** 2 for k in range(3)) for n in range(tiles)]
    np.testing.assert_allclose(brier_scores(labels, p), brier)
    np.testing.assert_allclose(log_losses(labels, p), [-math.log(max(p[n, labels[n]], 1e-12)) for n in range(tiles)])
    ece = 0.0
    for number in range(BINS):
        inside = [n for n in range(tiles) if number / BINS < p[n].max() - 1e-10 <= (number + 1) / BINS]
        ece += abs(sum((p[n].argmax() == labels[n]) - p[n].max() for n in inside)) / tiles
    assert expected_calibration_error(labels, p) == pytest.approx(ece, abs=1e-9)
    assert 0 <= debiased_error(labels, p, np.arange(tiles)) <= 1


def test_brier_and_log_loss_are_scikit_learns() -> None:
    labels, p = calibrated(300)
    found = calibration_errors(labels, p, np.arange(300))
    assert found.brier == pytest.approx(brier_score_loss(labels, p, labels=range(4), scale_by_half=False))
    assert found.log_loss == pytest.approx(log_loss(labels, p, labels=range(4)))


def test_the_diagram_is_scikit_learns() -> None:
    labels, p = calibrated(2000, classes=2)
    confidence, right = p.max(1), p.argmax(1) == labels
    accuracies, means = calibration_curve(right, confidence, n_bins=BINS)
    bins = reliability(labels, [p], Units.of(None, 2000))
    np.testing.assert_allclose([one.accuracy for one in bins], accuracies)
    np.testing.assert_allclose([one.confidence for one in bins], means)
    assert sum(one.count for one in bins) == 2000
    assert all(one.low <= one.accuracy <= one.high for one in bins)
    ece = sum(one.count * abs(one.accuracy - one.confidence) for one in bins) / 2000
    assert expected_calibration_error(labels, p) == pytest.approx(ece)


@pytest.mark.parametrize("seed", range(5))
def test_perfect_probabilities_have_no_error_but_chance(seed: int) -> None:
    """The expected ECE is at most that of the bins' standard errors, and three of its deviations more are rare."""
    labels, p = calibrated(3000, seed=seed)
    confidence, place = p.max(1), equal_width_bins(p.max(1))
    variances = np.bincount(place, confidence * (1 - confidence), minlength=BINS) / 3000**2
    expected, spread = np.sqrt(variances).sum() * math.sqrt(2 / math.pi), math.sqrt(variances.sum())
    assert expected_calibration_error(labels, p) < expected + 3 * spread
    assert debiased_error(labels, p, np.arange(3000)) < 0.025
    overconfident = softmax(3 * np.log(p))
    assert debiased_error(labels, overconfident, np.arange(3000)) > 0.1


def test_chance_is_that_of_slides() -> None:
    """A classifier that is calibrated over slides, not in each of them: the error of single tiles is the slides'."""
    generator = np.random.default_rng(0)
    unit = np.repeat(np.arange(40), 100)
    by_tile, by_slide = [], []
    for _ in range(20):
        accuracy = generator.beta(8, 2, 40)
        labels = (generator.random(4000) > accuracy[unit]).astype(np.int64)
        p = np.repeat([[0.8, 0.2]], 4000, axis=0)
        p += generator.uniform(-1e-6, 1e-6, 4000)[:, None] * [1, -1]  # bins of tiles of all slides
        by_tile.append(debiased_error(labels, p, np.arange(4000), bins=1))
        by_slide.append(debiased_error(labels, p, unit, bins=1))
    assert np.mean(by_slide) < 0.6 * np.mean(by_tile)


def test_bins() -> None:
    assert equal_width_bins(np.array([0.0, 1 / 15, 0.0667, 0.5, 1.0])).tolist() == [0, 0, 1, 7, 14]
    assert np.bincount(equal_mass_bins(np.linspace(0.2, 1, 150))).tolist() == [10] * BINS
    assert equal_mass_bins(np.ones(7)).tolist() == [0] * 7
