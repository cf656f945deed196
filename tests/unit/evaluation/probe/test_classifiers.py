"""The two classifiers on frozen features: what they compute, and what they may not look at."""

from __future__ import annotations

import numpy as np
import pytest

from ca2cl.evaluation.calibration.temperature import scaled_by
from ca2cl.evaluation.probe import classifiers
from ca2cl.evaluation.probe.classifiers import choose_strength, logistic_regression, nearest_neighbours
from ca2cl.evaluation.probe.sgd import SgdRecipe, sgd_classifier
from ca2cl.evaluation.protocol import HONEST


def clouds(count: int, *, classes: int = 3, dim: int = 8, spread: float = 1.0, seed: int = 0) -> tuple:
    """Gaussian clouds round fixed centres; another seed draws other tiles of the same classes."""
    centres = np.random.default_rng(99).normal(size=(classes, dim)) * 2
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    return (centres[labels] + spread * generator.normal(size=(count, dim))).astype(np.float32), labels


def accuracy(prediction: classifiers.Prediction, labels: np.ndarray) -> float:
    return float((prediction.probabilities.argmax(1) == labels).mean())


def loop_votes(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> np.ndarray:
    rows = []
    mean = train.astype(float).mean(0)
    for tile in test.astype(float) - mean:
        cosines = []
        for other, label in zip(train.astype(float) - mean, labels, strict=True):
            cosines.append((tile @ other / np.sqrt((tile @ tile) * (other @ other)), int(label)))
        votes = [0.0] * (int(max(labels)) + 1)
        for cosine, label in sorted(cosines, reverse=True)[:k]:
            votes[label] += max(cosine, 1e-9)
        k = min(k, len(train))
        rows.append([(k * vote / sum(votes) + 1 / len(votes)) / (k + 1) for vote in votes])
    return np.array(rows)


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_vote_as_the_loop_does(k: int) -> None:
    train, labels = clouds(40, spread=2.0)
    test, _ = clouds(17, spread=2.0, seed=1)
    found = nearest_neighbours(train, labels, test, k=k)
    np.testing.assert_allclose(found.probabilities, loop_votes(train, labels, test, k), atol=1e-5)


def test_neighbours_are_cut_to_the_labelled_tiles() -> None:
    train, labels = clouds(6)
    assert nearest_neighbours(train, labels, train, k=20).setting == {"k": 6.0}


def test_neighbours_do_not_care_for_the_features_unit_or_what_all_share() -> None:
    """Features of one sign, as after a ReLU and pooling, share most of their length."""
    train, labels = clouds(60, spread=2.0)
    test, truth = clouds(300, spread=2.0, seed=1)
    plain = nearest_neighbours(train, labels, test, k=5)
    offset = np.linspace(50, 200, 8, dtype=np.float32)
    moved = nearest_neighbours(train * 3 + offset, labels, test * 3 + offset, k=5)
    np.testing.assert_allclose(plain.probabilities, moved.probabilities, atol=1e-3)
    assert accuracy(moved, truth) == pytest.approx(accuracy(plain, truth), abs=0.01)


def test_neighbours_of_a_zero_feature_still_make_probabilities() -> None:
    train, labels = clouds(30)
    found = nearest_neighbours(train, labels, np.zeros((1, 8), np.float32), k=20)
    assert np.isfinite(found.probabilities).all() and found.probabilities.sum() == pytest.approx(1)


def test_logistic_regression_reaches_the_optimum_of_its_loss() -> None:
    """At the minimum of C * sum(log-loss) + |W|^2 / 2 the gradient is zero: C * X^T (P - Y) + W = 0, with W from P."""
    train, labels = clouds(90, spread=2.0)
    strength = 1.0
    found = logistic_regression(train, labels, train, seed=0, strength=strength)
    centred = train - train.mean(0)
    scaled = np.stack([tile / np.sqrt((tile**2).sum()) for tile in centred])
    residual = np.eye(3)[labels] - found.probabilities
    weights = strength * scaled.T @ residual
    logits = scaled @ weights
    # log P and the logits differ by a tile's normaliser and a class's bias: take both out
    log_p = np.log(found.probabilities)
    centred = [a - a.mean(1, keepdims=True) for a in (log_p, logits)]
    np.testing.assert_allclose(*(a - a.mean(0) for a in centred), atol=1e-2)
    np.testing.assert_allclose(residual.sum(0), 0, atol=1e-2)


def test_logistic_regression_does_not_care_for_the_features_unit_or_what_all_share() -> None:
    train, labels = clouds(60, spread=2.0)
    test, _ = clouds(30, spread=2.0, seed=1)
    plain = logistic_regression(train, labels, test, seed=0)
    offset = np.linspace(5, 20, 8, dtype=np.float32)
    moved = logistic_regression(train * 3 + offset, labels, test * 3 + offset, seed=0)
    np.testing.assert_allclose(plain.probabilities, moved.probabilities, atol=1e-3)


def test_a_feature_that_is_constant_in_training_does_not_decide() -> None:
    train, labels = clouds(60)
    test, truth = clouds(60, seed=1)
    train, test = (np.concatenate([x, np.full((60, 1), 0.1, np.float32)], 1) for x in (train, test))
    test[:, -1] += 1e-3
    assert accuracy(logistic_regression(train, labels, test, seed=0), truth) > 0.9


def test_noise_asks_for_stronger_regularisation_than_signal() -> None:
    signal, labels = clouds(300, spread=0.3)
    noise = np.random.default_rng(0).normal(size=(300, 64)).astype(np.float32)
    assert choose_strength(noise, labels, seed=0) < choose_strength(signal, labels, seed=0)


def test_too_few_labels_to_hold_out_use_the_documented_default() -> None:
    train, labels = clouds(12)
    assert choose_strength(train, labels, seed=0) == classifiers.DEFAULT_STRENGTH
    found = logistic_regression(train, labels, train, seed=0)
    assert found.setting == {"C": classifiers.DEFAULT_STRENGTH}


def test_the_strength_is_chosen_without_the_test_tiles() -> None:
    train, labels = clouds(120, spread=2.0)
    near, _ = clouds(30, seed=1)
    far = near * 100 + 50
    settings = [logistic_regression(train, labels, test, seed=0).setting for test in (near, far)]
    assert settings[0] == settings[1]


def test_both_classifiers_learn_two_and_nine_classes() -> None:
    for classes in (2, 9):
        train, labels = clouds(360, classes=classes)
        test, truth = clouds(180, classes=classes, seed=1)
        for found in (logistic_regression(train, labels, test, seed=0), nearest_neighbours(train, labels, test, k=20)):
            assert found.probabilities.shape == (180, classes)
            assert accuracy(found, truth) > 0.9


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("fit", ["logistic", "sgd"])
def test_the_kept_head_predicts_what_its_classifier_does(classes: int, fit: str) -> None:
    train, labels = clouds(90, classes=classes, spread=2.0)
    test, test_labels = clouds(40, classes=classes, spread=2.0, seed=1)
    if fit == "logistic":
        found = logistic_regression(train, labels, test, seed=0, strength=1.0)
    else:
        recipe = SgdRecipe(epochs=5, min_steps=1)
        found = sgd_classifier(train, labels, test, test_labels, seed=0, protocol=HONEST, recipe=recipe)
    assert found.head is not None
    np.testing.assert_allclose(found.head.probabilities(test), found.probabilities, atol=2e-6)
    cooled = found.head.cooled(2.5).probabilities(test)
    np.testing.assert_allclose(cooled, scaled_by(found.probabilities, 2.5), atol=2e-6)
