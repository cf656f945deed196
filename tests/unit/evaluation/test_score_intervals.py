"""Intervals of other scores than the accuracy: against loops that leave slides out, and known truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from benchmarks.coverage import World, coverage_of_scores
from ca2cl.evaluation.metrics import auroc_score, class_recalls, classification_metrics, score_intervals
from ca2cl.evaluation.result import score_row
from ca2cl.evaluation.statistics import Score, Units, ratio_score, score_interval

GENERATOR = np.random.default_rng(0)
UNIT = np.repeat(np.arange(8), [4, 9, 12, 7, 20, 5, 15, 8])
UNITS = Units(UNIT, known=True)
LABELS = GENERATOR.integers(0, 3, len(UNIT))
P = GENERATOR.dirichlet(np.ones(3), len(UNIT)) + 0.5 * np.eye(3)[LABELS]
P /= P.sum(1, keepdims=True)


def left_out(score: object) -> list[float]:
    return [score(LABELS[slide != UNIT], P[slide != UNIT]) for slide in range(8)]  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("balanced_accuracy", lambda y, p: balanced_accuracy_score(y, p.argmax(1))),
        ("macro_f1", lambda y, p: f1_score(y, p.argmax(1), average="macro")),
    ],
)
def test_the_interval_is_a_jackknife_of_slides_as_a_loop(name: str, score: object) -> None:
    low, high = score_intervals(LABELS, [P], UNITS)[name]
    value = score(LABELS, P)  # type: ignore[operator]
    variance = 7 / 8 * sum((one - value) ** 2 for one in left_out(score))
    center, slope = math.log(value / (1 - value)), value * (1 - value)
    ends = [math.log(end / (1 - end)) for end in (low, high)]
    assert np.mean(ends) == pytest.approx(center)
    weights = weight_of_slides(name)
    half = t.ppf(0.975, 1 / np.square(weights).sum() - 1) * math.sqrt(variance) / slope
    assert (ends[1] - ends[0]) / 2 == pytest.approx(half)


def weight_of_slides(name: str) -> np.ndarray:
    """Share of each slide in the denominators, a mean over classes."""
    shares = []
    for label in range(3):
        mine = np.equal(LABELS, label).astype(int) + (0 if name == "balanced_accuracy" else P.argmax(1) == label)
        shares.append([mine[slide == UNIT].sum() / mine.sum() for slide in range(8)])
    return np.mean(shares, axis=0)


def test_auroc_is_scikit_learns_and_moves_as_slides_are_left_out() -> None:
    found = auroc_score(LABELS, [P], UNITS)
    assert found.value_S[0] == pytest.approx(roc_auc_score(LABELS, P, multi_class="ovr"))
    expected = found.value_S[0] - np.array(left_out(lambda y, p: roc_auc_score(y, p, multi_class="ovr")))
    # pairs inside a slide are left out of it
    np.testing.assert_allclose(found.moved_SG[0], expected, atol=0.006)
    assert np.corrcoef(found.moved_SG[0], expected)[0, 1] > 0.98
    low, high = score_intervals(LABELS, [P], UNITS)["macro_auroc"]
    assert low < found.value_S[0] < high
    assert classification_metrics(LABELS, P).macro_auroc == pytest.approx(found.value_S[0])


def test_recalls_by_class() -> None:
    labels = np.where(UNIT == 3, 2, LABELS % 2)
    found = class_recalls(labels, [P, P[::-1]], UNITS)
    for label, one in enumerate(found):
        mine = labels == label
        expected = np.mean([(p.argmax(1) == label)[mine].mean() for p in (P, P[::-1])])
        assert one.recall == pytest.approx(expected) and one.tiles == mine.sum()
        assert one.units == len(set(UNIT[mine].tolist()))
    assert found[0].interval[0] < found[0].recall < found[0].interval[1]
    assert math.isnan(found[2].interval[0]), "one slide says nothing about others"
    absent = class_recalls(np.zeros(len(UNIT), np.int64), [P], UNITS)[2]
    assert math.isnan(absent.recall) and absent.tiles == 0


def test_draws_that_differ_widen_it_and_draws_that_are_alike_do_not() -> None:
    one = ratio_score(np.array([[[3.0], [8.0], [5.0]]]), np.array([[[5.0], [10.0], [9.0]]]))
    alike = Score(np.repeat(one.value_S, 4), np.repeat(one.moved_SG, 4, axis=0), one.weight_G)
    assert score_interval(alike) == pytest.approx(score_interval(one))
    apart = Score(alike.value_S + [-0.1, 0.1, -0.1, 0.1], alike.moved_SG, one.weight_G)
    low, high = score_interval(apart)
    assert low < score_interval(one)[0] and high > score_interval(one)[1]


def test_ends_of_the_scale() -> None:
    sizes = np.full((1, 10, 1), 4.0)
    assert score_interval(ratio_score(sizes, sizes)) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert score_interval(ratio_score(0 * sizes, sizes))[0] == 0.0
    assert math.isnan(score_interval(ratio_score(sizes[:, :1], sizes[:, :1]))[0])


def test_scaled_errors_stand_beside_raw_ones_where_every_draw_has_a_temperature() -> None:
    both = score_row("encoder", "linear", 1.0, 9, LABELS, [P, P], [{}, {}], UNITS, temperatures=[0.5, 0.5])
    assert both.calibration is not None and {"brier", "scaled_brier", "scaled_log_loss"} < set(both.intervals)
    errors = both.calibration.errors()
    assert both.intervals["scaled_brier"][0] < errors["scaled_brier"][0] < both.intervals["scaled_brier"][1]
    one = score_row("encoder", "linear", 1.0, 9, LABELS, [P, P], [{}, {}], UNITS, temperatures=[0.5, None])
    assert one.calibration is not None and one.calibration.scaled == one.calibration.temperatures == []
    assert "scaled_brier" not in one.intervals


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Thirty slides, ICC about .07; ``python -m benchmarks.coverage`` is the whole table."""
    held = coverage_of_scores(World(30, 1.0), 100, np.random.default_rng(0))
    assert all(share >= 0.88 for share in held.values()), held
