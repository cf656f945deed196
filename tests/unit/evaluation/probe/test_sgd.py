"""The linear probe by SGD: what it computes, what chooses its epoch, and what it may not look at."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from ca2cl.config import OptimConfig
from ca2cl.evaluation.features import centred
from ca2cl.evaluation.labelled import LabelledOrder, hold_out
from ca2cl.evaluation.probe.classifiers import Prediction, logistic_regression
from ca2cl.evaluation.probe.sgd import RECIPE, SgdRecipe, sgd_classifier
from ca2cl.evaluation.protocol import HONEST, ORIGINAL, Protocol
from tests.unit.evaluation.probe.test_classifiers import accuracy, clouds

SHORT = replace(RECIPE, epochs=10, min_steps=20)


def fit(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    protocol: Protocol = HONEST,
    seed: int = 0,
    groups: list[str] | None = None,
    recipe: SgdRecipe = SHORT,
) -> Prediction:
    return sgd_classifier(*train, *test, seed=seed, protocol=protocol, groups=groups, recipe=recipe)


def loop(train: np.ndarray, labels: np.ndarray, test: np.ndarray, seed: int, recipe: SgdRecipe) -> np.ndarray:
    """The same in numpy, step by step: Nesterov's momentum, L2 inside the gradient, a rate for every epoch."""
    train, test = (x.astype(float) for x in centred(train, test))
    weight, speed = np.zeros((2, train.shape[1] + 1, labels.max() + 1))  # the bias is the weight of a constant
    train, test = (np.concatenate([x, np.ones((len(x), 1))], 1) for x in (train, test))
    order = LabelledOrder(np.arange(len(train)), recipe.batch_size, seed)
    for step in range(recipe.epochs * order.steps_per_epoch):
        turn = step // order.steps_per_epoch % 5 / 5
        (places,) = order.batches(range(step, step + 1))
        rows = order.samples_N[places]
        odds = np.exp(train[rows] @ weight)
        error = odds / odds.sum(1, keepdims=True) - np.eye(labels.max() + 1)[labels[rows]]
        gradient = train[rows].T @ error / len(rows) + recipe.optim.weight_decay * weight
        speed = 0.9 * speed + gradient
        weight = weight - recipe.optim.lr * (1 + np.cos(np.pi * turn)) / 2 * (gradient + 0.9 * speed)
    odds = np.exp(test @ weight)
    return odds / odds.sum(1, keepdims=True)


@pytest.mark.parametrize("batch_size", [7, 256])
def test_it_steps_as_the_loop_does(batch_size: int) -> None:
    train, labels = clouds(30, spread=2.0)
    test = clouds(12, spread=2.0, seed=1)
    recipe = SgdRecipe(
        replace(RECIPE.optim, lr=0.5, weight_decay=0.01), epochs=10, min_steps=1, batch_size=batch_size, held_out=0.0
    )
    found = fit((train, labels), test, seed=3, recipe=recipe)
    np.testing.assert_allclose(found.probabilities, loop(train, labels, test[0], 3, recipe), atol=1e-5)
    assert found.setting == {"epoch": 10, "held_out": 0}


def test_it_does_as_well_as_logistic_regression() -> None:
    for classes in (2, 9):
        train, test = clouds(360, classes=classes), clouds(180, classes=classes, seed=1)
        found = fit(train, test, recipe=RECIPE)
        assert found.probabilities.shape == (180, classes)
        np.testing.assert_allclose(found.probabilities.sum(1), 1)
        assert accuracy(found, test[1]) > 0.9
        assert abs(accuracy(found, test[1]) - accuracy(logistic_regression(*train, test[0], seed=0), test[1])) < 0.05


def test_the_unit_of_the_features_and_what_all_share_do_not_matter() -> None:
    train, labels = clouds(60, spread=2.0)
    test, truth = clouds(30, spread=2.0, seed=1)
    offset = np.linspace(5, 20, 8, dtype=np.float32)
    plain, moved = (
        fit((x, labels), (y, truth)) for x, y in ((train, test), (train * 3e4 + offset, test * 3e4 + offset))
    )
    np.testing.assert_allclose(plain.probabilities, moved.probabilities, atol=1e-3)


def test_honestly_the_test_labels_change_no_bit() -> None:
    train, (test, truth) = clouds(90, spread=2.0), clouds(60, spread=2.0, seed=1)
    found = [fit(train, (test, labels)) for labels in (truth, (truth + 1) % 3)]
    assert found[0].probabilities.tobytes() == found[1].probabilities.tobytes()
    assert found[0].setting == found[1].setting and found[0].setting["held_out"] == 18


def test_a_seed_decides_everything() -> None:
    train, test = clouds(90, spread=2.0), clouds(60, spread=2.0, seed=1)
    first, again, other = (fit(train, test, seed=seed).probabilities.tobytes() for seed in (4, 4, 5))
    assert first == again != other


def test_held_out_tiles_end_it_before_noise_is_learnt() -> None:
    generator = np.random.default_rng(0)
    noise, labels = generator.normal(size=(100, 64)).astype(np.float32), np.arange(100) % 2
    recipe = replace(RECIPE, optim=replace(RECIPE.optim, lr=30.0))
    found = fit((noise, labels), (noise, labels), recipe=recipe)
    assert found.setting["epoch"] < 20
    held_M = hold_out(labels, [None] * 100, RECIPE.held_out, 0)[0]
    assert accuracy(Prediction(found.probabilities[held_M], {}), labels[held_M]) < 0.8


def test_whole_slides_are_held_out() -> None:
    train, test = clouds(120, spread=2.0), clouds(60, spread=2.0, seed=1)
    sizes = [3, 12, 21, 27, 27, 30]
    slides = [f"s{slide}" for slide, size in enumerate(sizes) for _ in range(size)]
    found = fit(train, test, groups=slides)
    whole = {sum(chosen) for count in (1, 2) for chosen in combinations(sizes, count)}
    assert found.setting["held_out"] in whole - {24.0}  # 24 tiles would be a fifth of the tiles of any slide
    assert found.probabilities.tobytes() != fit(train, test).probabilities.tobytes()


def test_with_too_few_labels_to_hold_out_the_last_epoch_is_taken() -> None:
    train, test = clouds(6), clouds(60, seed=1)
    assert fit(train, test).setting == {"epoch": 20, "held_out": 0}  # one step an epoch, min_steps of them


def test_the_last_epoch_is_one_of_small_steps() -> None:
    recipe = replace(SHORT, optim=OptimConfig(name="sgd", schedule="cosine_restarts", restart_epochs=6), min_steps=7)
    assert fit(clouds(6), clouds(60, seed=1), recipe=recipe).setting["epoch"] == 12


def test_by_the_original_protocol_all_labels_train_and_the_test_tiles_choose() -> None:
    train, test = clouds(90, spread=3.0), clouds(60, spread=3.0, seed=1)
    found = fit(train, test, ORIGINAL)
    every = [
        fit(train, test, replace(ORIGINAL, selects_on_test=False), recipe=replace(SHORT, epochs=epochs, min_steps=1))
        for epochs in (5, 10)
    ]
    assert [one.setting for one in every] == [{"epoch": 5, "held_out": 0}, {"epoch": 10, "held_out": 0}]
    assert accuracy(found, test[1]) >= max(accuracy(one, test[1]) for one in every)
    assert found.setting["held_out"] == 0 and found.setting["epoch"] < 20
    wrong = fit(train, (test[0], (test[1] + 1) % 3), ORIGINAL)  # labels that learning makes less likely
    assert wrong.setting["epoch"] != found.setting["epoch"]
