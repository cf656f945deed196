"""Score features with every classifier, label budget, test set and seed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.console.progress import ProgressBar
from ca2cl.evaluation.features import Features
from ca2cl.evaluation.linear_head import LinearHead
from ca2cl.evaluation.probe.classifiers import (
    Prediction,
    Strength,
    held_out_temperature,
    logistic_regression,
    nearest_neighbours,
)
from ca2cl.evaluation.probe.sgd import RECIPE, SgdRecipe, sgd_classifier
from ca2cl.evaluation.protocol import HONEST, Protocol
from ca2cl.evaluation.result import Row, score_row
from ca2cl.evaluation.splits import IntArray, Subsets, describe_budget
from ca2cl.evaluation.statistics import Units

logger = logging.getLogger(__name__)

LINEAR, SGD, KNN = "linear", "linear SGD", "k-NN"


@dataclass(frozen=True)
class Scoring:
    """Classifiers and their settings."""

    k: int = 20
    """Neighbours that vote."""
    strength: Strength = 1.0
    """C of the logistic regression, or auto."""
    classifiers: Sequence[str] = (LINEAR, SGD, KNN)
    groups: Sequence[str | None] | None = None
    """Slide or patient of every training tile: whole ones are held out then, where any are."""
    protocol: Protocol = HONEST
    recipe: SgdRecipe = RECIPE
    units: Mapping[str, Units] = field(default_factory=dict)
    """Units that the tiles of each test set are resampled by; single tiles where it has none."""
    calibrate: bool = False
    """Choose a temperature on held-out labelled tiles, where the protocol holds any out."""


Heads = dict[tuple[str, str, float], LinearHead]
"""Fitted linear classifiers by features, classifier and budget."""


def score(
    train: Features, tests: Mapping[str, Features], subsets: Subsets, how: Scoring, heads: Heads | None = None
) -> list[Row]:
    """Every row of the table, features first, then classifier, then budget, then test set.

    Args:
        train: features of the training tiles.
        tests: features of the test tiles by the set's name.
        subsets: labelled rows by budget and seed.
        how: classifiers and their settings.
        heads: gets the linear classifiers of the first draws.
    """
    rows: list[Row] = []
    fits = sum(map(len, subsets.values())) * len(train.values) * len(how.classifiers)
    with ProgressBar(total=fits, desc="classifiers", unit="fit") as bar:
        for name in train.values:
            for classifier in how.classifiers:
                for budget, draws in subsets.items():
                    bar.set_postfix_str(f"{name}, {classifier}, {describe_budget(budget)} labels")
                    made = _predictions(name, classifier, draws, train, tests, how, bar)
                    first = next(iter(made.values()))[0]
                    if heads is not None and first.head is not None:
                        heads[name, classifier, budget] = first.head
                    new = [
                        score_row(
                            name, classifier, budget, len(draws[0]), tiles.labels_N,
                            [found.probabilities for found in made[test]], [found.setting for found in made[test]],
                            how.units.get(test), test, [found.temperature for found in made[test]],
                        )
                        for test, tiles in tests.items()
                    ]  # fmt: skip
                    rows += new
                    logger.info(
                        "%s, %s, %s labels: accuracy %s",
                        name,
                        classifier,
                        describe_budget(budget),
                        ", ".join(f"{row.mean_sd('accuracy')[0]:.4f}" for row in new),
                    )
    return rows


def _predictions(
    name: str, classifier: str, draws: Sequence[IntArray], train: Features, tests: Mapping[str, Features], how: Scoring,
    bar: ProgressBar,
) -> dict[str, list[Prediction]]:  # fmt: skip
    """One prediction a seed for every test set."""
    made: dict[str, list[Prediction]] = {test: [] for test in tests}
    by_chance = classifier == SGD or (classifier == LINEAR and how.strength == "auto")
    # One fit serves all test sets, unless a test set chooses the model: then each chooses its own.
    together = [[test] for test in tests] if how.protocol.selects_on_test else [list(tests)]
    for seed, rows in enumerate(draws):
        same = seed > 0 and not by_chance and np.array_equal(rows, draws[seed - 1])
        for names in together:
            if same:  # all labels: the seed has nothing left to decide
                for test in names:
                    made[test].append(made[test][-1])
                continue
            values_MD = np.concatenate([tests[test].values[name] for test in names])
            labels_M = np.concatenate([tests[test].labels_N for test in names])
            found = classify(classifier, train.values[name], train.labels_N, rows, values_MD, labels_M, seed, how)
            ends = np.cumsum([len(tests[test]) for test in names])[:-1]
            for test, part in zip(names, np.split(found.probabilities, ends), strict=True):
                head = found.head if seed == 0 else None
                made[test].append(replace(found, probabilities=part, head=head))
        bar.update()
    return made


def classify(
    classifier: str, values_ND: npt.NDArray[np.float32], labels_N: IntArray, rows: IntArray,
    test_MD: npt.NDArray[np.float32], test_labels_M: IntArray, seed: int, how: Scoring,
) -> Prediction:  # fmt: skip
    """Fit a classifier and predict the test tiles.

    Args:
        classifier: ``LINEAR``, ``SGD`` or ``KNN``.
        values_ND: features of the training tiles.
        labels_N: their classes.
        rows: those that are labelled.
        test_MD: features of the test tiles.
        test_labels_M: their classes, which only a protocol that selects on the test tiles reads.
        seed: of the order of the tiles, and of which are held out.
        how: settings.
    """
    labelled = values_ND[rows], labels_N[rows], test_MD
    groups = None if how.groups is None else [how.groups[row] for row in rows]
    if classifier == SGD:
        return sgd_classifier(
            *labelled, test_labels_M, seed=seed, protocol=how.protocol, groups=groups, recipe=how.recipe
        )
    if classifier == KNN:
        found = nearest_neighbours(*labelled, k=how.k)
    else:
        found = logistic_regression(
            *labelled, seed=seed, strength=how.strength, protocol=how.protocol, groups=groups
        )  # fmt: skip
    if not how.calibrate or not how.protocol.holds_out:
        return found

    def again(train_FD: Any, labels_F: IntArray, held_HD: Any) -> npt.NDArray[np.float64]:
        if classifier == KNN:
            return nearest_neighbours(train_FD, labels_F, held_HD, k=how.k).probabilities
        return logistic_regression(train_FD, labels_F, held_HD, seed=seed, strength=found.setting["C"]).probabilities

    return replace(found, temperature=held_out_temperature(again, *labelled[:2], seed=seed, groups=groups))
