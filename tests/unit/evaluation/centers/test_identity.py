"""Probes of the centre and of the slide."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ca2cl.evaluation.centers.identity import (
    CLASS_ALONE,
    balanced,
    center_task,
    class_alone,
    scores,
    slide_task,
)
from ca2cl.evaluation.features import FloatArray

Integers = npt.NDArray[np.int64]
GENERATOR = np.random.default_rng(0)
CENTERS = np.repeat(np.arange(3), [80, 120, 200])
SLIDES = [f"slide {c}-{n % 8}" for c, n in zip(CENTERS, range(400), strict=True)]
LABELS = GENERATOR.integers(0, 2, 400)


def nearest_mean(fit_FD: FloatArray, targets_F: Integers, held_HD: FloatArray) -> npt.NDArray[np.float64]:
    means = np.stack([fit_FD[targets_F == t].mean(axis=0) for t in range(targets_F.max() + 1)])
    far = ((held_HD[:, None] - means) ** 2).sum(axis=2)
    odds = np.exp(-far)
    return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float64)


def of_slides(seed: int) -> npt.NDArray[np.float64]:
    """Features that name the slide, and nothing else."""
    marks = {slide: np.random.default_rng((seed, n)).normal(size=16) for n, slide in enumerate(sorted(set(SLIDES)))}
    return np.stack([marks[slide] for slide in SLIDES])


def test_features_that_name_the_slide_say_nothing_of_the_centre_of_another_one() -> None:
    task = center_task(CENTERS, ["a", "b", "c"], SLIDES)
    assert task is not None and task.chance == pytest.approx(1 / 3)
    for fold in range(task.fold_N.max() + 1):
        held = {SLIDES[row] for row in task.rows[task.fold_N == fold]}
        assert not held & {SLIDES[row] for row in task.rows[task.fold_N != fold]}
    features = {"slide": of_slides(0), "centre": np.eye(16)[CENTERS] * 4 + of_slides(1) / 10}
    slide, centre, floor = scores(task, features, LABELS, {"mean": nearest_mean})
    assert 0.1 < slide.balanced_accuracy < 0.6 and centre.balanced_accuracy > 0.95
    assert slide.interval_95[0] <= slide.balanced_accuracy <= slide.interval_95[1]
    assert floor.features == CLASS_ALONE and 1 / 3 <= floor.balanced_accuracy < 0.45
    loose = center_task(CENTERS, ["a", "b", "c"], None)
    assert loose is not None and "easier" in loose.notes[0]
    (leaky, *_) = scores(loose, {"slide": features["slide"]}, LABELS, {"mean": nearest_mean})
    assert leaky.balanced_accuracy > slide.balanced_accuracy + 0.2, "slides in both parts are known again"


def test_the_slide_is_predicted_from_its_other_tiles() -> None:
    small = ["slide lone", *SLIDES[1:]]
    task = slide_task(small)
    assert task is not None and len(task.names) == 24 and 0 not in task.rows and "24 of 25 slides" in task.notes[0]
    noise = GENERATOR.normal(size=(400, 16))
    known, blind, _ = scores(task, {"slide": of_slides(0), "noise": noise}, LABELS, {"mean": nearest_mean})
    assert known.balanced_accuracy == 1.0 and blind.balanced_accuracy < 0.15
    for fold in range(5):
        assert set(task.target_N[task.fold_N == fold]) == set(range(24)), "every slide has tiles in every fold"
    assert slide_task(None) is None and slide_task(["slide a"] * 9 + ["slide b"]) is None


def test_no_slide_loses_its_tiles_to_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ca2cl.evaluation.centers.identity.MOST_TILES", 40)
    task = slide_task(["slide large"] * 900 + ["slide a"] * 6 + ["slide b"] * 5 + ["slide c"] * 4)
    assert task is not None and np.bincount(task.target_N).tolist() == [6, 5, 13]
    centers = center_task(np.repeat([0, 1], [900, 30]), ["large", "small"], None)
    assert centers is not None and np.bincount(centers.target_N).tolist() == [20, 20]


def test_a_centre_of_one_slide_is_left_out() -> None:
    slides = [f"slide {c}" if c == 0 else slide for c, slide in zip(CENTERS, SLIDES, strict=True)]
    task = center_task(CENTERS, ["a", "b", "c"], slides)
    assert task is not None and task.names == ["b", "c"] and task.notes == ["centres of a single slide are left out: a"]
    assert set(task.rows) == set(np.flatnonzero(CENTERS > 0)) and set(task.target_N) == {0, 1}
    assert center_task(np.where(CENTERS == 0, 0, -1), ["a", "b"], slides) is None


def test_a_small_centre_is_not_outvoted() -> None:
    """A guess from the targets' shares alone would always be the large centre."""
    small = np.where(np.arange(400) % 10 == 0, 0, 1)
    values = 1.5 * small[:, None] + GENERATOR.normal(size=(400, 1))
    task = center_task(small, ["a", "b"], None)
    assert task is not None

    def by_share(fit_FD: FloatArray, targets_F: Integers, held_HD: FloatArray) -> npt.NDArray[np.float64]:
        odds = nearest_mean(fit_FD, targets_F, held_HD) * np.bincount(targets_F)
        return np.asarray(odds / odds.sum(axis=1, keepdims=True), np.float64)

    (found, _) = scores(task, {"value": values}, LABELS, {"mean": by_share})
    assert found.balanced_accuracy > 0.65


def test_balanced_accuracy_and_the_best_guess_from_the_class() -> None:
    target = np.array([0, 0, 0, 0, 1, 1])
    assert balanced(np.array([1, 1, 0, 0, 1, 1], bool), target) == 0.75
    # class 0: .75 of target 0, .5 of target 1; class 1: .25 and .5. Best guesses are 0 and 1.
    assert class_alone(np.array([0, 0, 0, 1, 0, 1]), target) == pytest.approx((0.75 + 0.5) / 2)
