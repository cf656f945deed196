"""The temperature: known ones are found again, and it is scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from ca2cl.evaluation.calibration.probability_errors import log_losses
from ca2cl.evaluation.calibration.temperature import COLDEST, fit_temperature, scaled_by
from ca2cl.evaluation.probe.classifiers import held_out_temperature
from tests.unit.evaluation.calibration.test_probability_errors import calibrated, softmax


@given(st.floats(0.3, 4), st.integers(0, 20))
@settings(max_examples=25, deadline=None)
def test_a_known_factor_is_found_again(factor: float, seed: int) -> None:
    labels, p = calibrated(4000, seed=seed)
    sharpened = softmax(factor * np.log(p))
    found = fit_temperature(labels, sharpened)
    assert found == pytest.approx(factor, rel=0.12)
    np.testing.assert_allclose(scaled_by(sharpened, factor), p, atol=1e-6)


@given(st.floats(0.05, 20), st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_scaling_moves_no_prediction(temperature: float, seed: int) -> None:
    _, p = calibrated(50, seed=seed)
    scaled = scaled_by(p, temperature)
    np.testing.assert_allclose(scaled.sum(1), 1)
    assert scaled.argmax(1).tolist() == p.argmax(1).tolist()


class Logits(ClassifierMixin, BaseEstimator):
    """Its features are its logits."""

    def fit(self, x: np.ndarray, y: np.ndarray) -> Logits:
        self.classes_ = np.unique(y)
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return x.argmax(1)

    def decision_function(self, x: np.ndarray) -> np.ndarray:
        return x


def test_it_is_scikit_learns() -> None:
    labels, p = calibrated(3000)
    logits = 2.5 * np.log(p)
    model = CalibratedClassifierCV(FrozenEstimator(Logits().fit(logits, labels)), method="temperature")
    expected = model.fit(logits, labels).predict_proba(logits)
    sharp = softmax(logits)
    found = scaled_by(sharp, fit_temperature(labels, sharp))
    np.testing.assert_allclose(found, expected, atol=2e-3)
    assert log_losses(labels, found).mean() < log_losses(labels, sharp).mean()


def test_tiles_that_are_all_right_make_nothing_certain() -> None:
    labels = np.arange(20) % 2
    p = np.where(np.eye(2)[labels] == 1, 0.9, 0.1)
    found = fit_temperature(labels, p)
    assert 2 * COLDEST < found < 0.8, "sharper, and not as sharp as it goes"
    assert fit_temperature(1 - labels, p) > 2
    with pytest.raises(ValueError, match="labels are empty"):
        fit_temperature(labels[:0], p[:0])


def test_no_tile_is_predicted_by_a_classifier_that_was_trained_on_it_or_its_slide() -> None:
    tiles = np.arange(120, dtype=np.float64)[:, None]
    labels, slides = np.arange(120) % 3, [f"s{n // 6}" for n in range(120)]
    seen = []

    def fit(train: np.ndarray, of: np.ndarray, held: np.ndarray) -> np.ndarray:
        inside, outside = train[:, 0].astype(int), held[:, 0].astype(int)
        assert not {slides[n] for n in inside} & {slides[n] for n in outside}
        assert of.tolist() == labels[inside].tolist()
        seen.extend(outside.tolist())
        return softmax(4.0 * np.eye(3)[labels[outside]])

    found = held_out_temperature(fit, tiles, labels, seed=0, groups=slides)
    assert sorted(seen) == list(range(120)) and found is not None and found < 1
    assert held_out_temperature(fit, tiles[:4], labels[:4], seed=0, groups=slides[:4]) is None
