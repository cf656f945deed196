"""The one metrics function, against numbers worked out by hand and against the definitions as slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.evaluation.metrics import classification_metrics, mean_sd


def one_hot(predictions: list[int], classes: int) -> np.ndarray:
    return np.eye(classes)[predictions]


def loop_scores(labels: list[int], probabilities: np.ndarray) -> dict[str, float]:
    """Every definition tile by tile, pair by pair."""
    classes = probabilities.shape[1]
    predictions = []
    for row in probabilities:
        best = 0
        for c in range(classes):
            if row[c] > row[best]:
                best = c
        predictions.append(best)
    precision, recall, f1, held_recall, areas = [], [], [], [], []
    for c in range(classes):
        true_positive = sum(t == c and p == c for t, p in zip(labels, predictions, strict=True))
        held, predicted = labels.count(c), predictions.count(c)
        if held + predicted == 0:
            continue
        p = true_positive / predicted if predicted else 0.0
        r = true_positive / held if held else 0.0
        precision.append(p)
        recall.append(r)
        f1.append(2 * p * r / (p + r) if p + r else 0.0)
        if held:
            held_recall.append(r)
        if 0 < held < len(labels):
            won = 0.0
            for i, t in enumerate(labels):
                for j, u in enumerate(labels):
                    if t == c and u != c:
                        a, b = probabilities[i, c], probabilities[j, c]
                        won += 1.0 if a > b else 0.5 if a == b else 0.0
            areas.append(won / (held * (len(labels) - held)))
    return {
        "accuracy": sum(t == p for t, p in zip(labels, predictions, strict=True)) / len(labels),
        "balanced_accuracy": float(np.mean(held_recall)),
        "macro_f1": float(np.mean(f1)),
        "macro_precision": float(np.mean(precision)),
        "macro_recall": float(np.mean(recall)),
        "macro_auroc": float(np.mean(areas)) if areas else math.nan,
    }


def test_scores_equal_the_numbers_worked_out_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    scores = classification_metrics(labels, one_hot([0, 0, 1, 1, 0, 2], 3))
    assert scores.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert scores.accuracy == pytest.approx(4 / 6)
    assert scores.balanced_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.macro_precision == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # pairs won: class 0: (2*(2+.5) + .5*2)/9 = 6/9; class 1: (3+.5 + .5*3+0)/8 = 5/8; class 2: 1
    assert scores.macro_auroc == pytest.approx((6 / 9 + 5 / 8 + 1) / 3)


def test_accuracy_and_balanced_accuracy_differ_on_an_unbalanced_set() -> None:
    scores = classification_metrics(np.array([0] * 9 + [1]), one_hot([0] * 10, 2))
    assert scores.accuracy == pytest.approx(0.9)
    assert scores.balanced_accuracy == pytest.approx(0.5)
    assert scores.macro_f1 == pytest.approx((18 / 19 + 0) / 2)
    assert scores.macro_auroc == pytest.approx(0.5)


def test_a_class_without_test_tiles_counts_only_where_it_was_predicted() -> None:
    unseen = classification_metrics(np.array([0, 1]), one_hot([0, 1], 3))
    assert (unseen.accuracy, unseen.macro_f1, unseen.macro_recall, unseen.macro_auroc) == (1, 1, 1, 1)
    predicted = classification_metrics(np.array([0, 1]), one_hot([0, 2], 3))
    assert predicted.balanced_accuracy == pytest.approx(1 / 2)
    assert predicted.macro_recall == pytest.approx(1 / 3)


def test_auroc_is_undefined_when_the_test_set_is_one_class() -> None:
    scores = classification_metrics(np.array([1, 1]), np.array([[0.2, 0.8], [0.6, 0.4]]))
    assert math.isnan(scores.macro_auroc)
    assert scores.accuracy == 0.5


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], np.ndarray]:
    classes = draw(st.integers(1, 5))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=24))
    # few levels, so that ties between tiles and between classes are common
    cells = draw(st.lists(st.integers(0, 4), min_size=len(labels) * classes, max_size=len(labels) * classes))
    return labels, np.array(cells, float).reshape(len(labels), classes) / 4


@given(problems())
@settings(deadline=None, max_examples=150)
def test_scores_equal_the_definitions_as_loops(problem: tuple[list[int], np.ndarray]) -> None:
    labels, probabilities = problem
    found = classification_metrics(np.array(labels), probabilities)
    for name, value in loop_scores(labels, probabilities).items():
        assert found.scores()[name] == pytest.approx(value, abs=1e-12, nan_ok=True), name
    for label in range(probabilities.shape[1]):
        assert found.confusion[label].sum() == labels.count(label)


def test_scores_equal_those_of_scikit_learn() -> None:
    from sklearn import metrics

    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 300)
    probabilities = generator.dirichlet(np.ones(4), 300)
    predictions = probabilities.argmax(1)
    scores = classification_metrics(labels, probabilities)
    assert scores.accuracy == pytest.approx(metrics.accuracy_score(labels, predictions))
    assert scores.balanced_accuracy == pytest.approx(metrics.balanced_accuracy_score(labels, predictions))
    assert scores.macro_f1 == pytest.approx(metrics.f1_score(labels, predictions, average="macro"))
    assert scores.macro_precision == pytest.approx(metrics.precision_score(labels, predictions, average="macro"))
    assert scores.macro_auroc == pytest.approx(metrics.roc_auc_score(labels, probabilities, multi_class="ovr"))
    assert (scores.confusion == metrics.confusion_matrix(labels, predictions)).all()


@pytest.mark.parametrize(
    ("labels", "probabilities", "words"),
    [
        (np.array([0, 2]), np.eye(2), "need 0..1"),
        (np.array([0, -1]), np.eye(2), "need 0..1"),
        (np.array([0]), np.eye(2), r"need \(N,\)"),
        (np.zeros(0, int), np.zeros((0, 2)), "empty"),
        (np.array([0, 1]), np.array([[np.nan, 1], [1, 0]]), "finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(labels: np.ndarray, probabilities: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classification_metrics(labels, probabilities)


def test_mean_and_sample_sd() -> None:
    assert mean_sd([0.1, 0.2, 0.3]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert math.isnan(mean_sd([0.5])[1])
