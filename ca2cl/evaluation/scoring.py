"""One set of features → its rows of the table: classifiers x label budgets x seeds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ca2cl.data.splits import describe_budget, labelled_subset, replaced_subset
from ca2cl.evaluation.classifiers import Prediction, Strength, logistic_regression, nearest_neighbours
from ca2cl.evaluation.features import Features
from ca2cl.evaluation.metrics import ClassificationMetrics, bootstrap_interval, classification_metrics, mean_sd
from ca2cl.evaluation.protocol import HONEST, Protocol

logger = logging.getLogger(__name__)

LINEAR, KNN = "linear", "k-NN"
Subsets = Mapping[float, Sequence[npt.NDArray[np.int64]]]
"""Rows of the training features that count as labelled: budget → one array a seed."""


@dataclass(frozen=True)
class Row:
    """One classifier on one kind of features at one label budget, over all seeds."""

    features: str
    classifier: str
    budget: float
    labelled: int
    """Labelled tiles."""
    per_seed: list[ClassificationMetrics]
    settings: list[dict[str, float]]
    """What each seed's classifier ended with: C, or k."""
    interval: tuple[float, float]
    """95 % bootstrap interval, over test tiles, of the accuracy averaged over seeds."""

    def mean_sd(self, score: str) -> tuple[float, float]:
        """Mean and sample sd over seeds of a score of ``ClassificationMetrics``."""
        return mean_sd([metrics.scores()[score] for metrics in self.per_seed])

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Counts summed over seeds, (K, K): row = label, column = prediction."""
        return np.asarray(np.sum([metrics.confusion for metrics in self.per_seed], axis=0), np.int64)


def draw_subsets(
    labels_N: npt.NDArray[np.int64],
    budgets: Sequence[float],
    seeds: int,
    *,
    groups: Sequence[str | None] | None = None,
    protocol: Protocol = HONEST,
) -> Subsets:
    """The labelled rows for every budget and for seeds 0..seeds-1; the budget with the fewest tiles comes first.

    Args:
        groups: slide or patient of every row, for a draw by slide (``data.splits.labelled_subset``).
        protocol: whether a tile may be drawn twice; slides then play no part.
    """

    def draw(budget: float, seed: int) -> npt.NDArray[np.int64]:
        if protocol.replacement:
            return replaced_subset(labels_N, budget, seed)
        return labelled_subset(labels_N, budget, seed, groups)

    drawn = {budget: [draw(budget, seed) for seed in range(seeds)] for budget in set(budgets)}
    return dict(sorted(drawn.items(), key=lambda entry: (len(entry[1][0]), entry[0])))


def score(train: Features, test: Features, subsets: Subsets, *, k: int, strength: Strength) -> list[Row]:
    """Every row of the table, features first, then classifier, then budget."""
    rows = []
    steps = len(train.values) * len(subsets) * 2
    with tqdm(total=steps, desc="classifiers", unit="row", disable=None) as bar:
        for name in train.values:
            for classifier in (LINEAR, KNN):
                for budget, draws in subsets.items():
                    rows.append(_row(name, classifier, budget, draws, train, test, k, strength))
                    bar.update()
                    logger.info(
                        "%s, %s, %s labels: accuracy %.4f",
                        name,
                        classifier,
                        describe_budget(budget),
                        rows[-1].mean_sd("accuracy")[0],
                    )
    return rows


def _row(
    name: str,
    classifier: str,
    budget: float,
    draws: Sequence[npt.NDArray[np.int64]],
    train: Features,
    test: Features,
    k: int,
    strength: Strength,
) -> Row:
    predictions: list[Prediction] = []
    for seed, rows in enumerate(draws):
        labelled = train.values[name][rows], train.labels_N[rows], test.values[name]
        random = classifier == LINEAR and strength == "auto"
        if predictions and not random and np.array_equal(rows, draws[seed - 1]):
            predictions.append(predictions[-1])  # all labels: neither classifier has randomness of its own
        elif classifier == LINEAR:
            predictions.append(logistic_regression(*labelled, seed=seed, strength=strength))
        else:
            predictions.append(nearest_neighbours(*labelled, k=k))
    correct_SN = np.stack([p.probabilities.argmax(axis=1) == test.labels_N for p in predictions])
    return Row(
        features=name,
        classifier=classifier,
        budget=budget,
        labelled=len(draws[0]),
        per_seed=[classification_metrics(test.labels_N, p.probabilities) for p in predictions],
        settings=[p.setting for p in predictions],
        interval=bootstrap_interval(correct_SN),
    )
