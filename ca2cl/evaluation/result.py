"""Row of a result table: scores over seeds with their interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.metrics import ClassificationMetrics, classification_metrics, mean_sd
from ca2cl.evaluation.statistics import Interval, Units, bootstrap_interval

ENCODER = "encoder"
"""Features of the encoder that is evaluated, by their name in tables, files and metrics."""


@dataclass(frozen=True)
class Row:
    """One classifier on one kind of features at one label budget and on one test set, over all seeds."""

    features: str
    classifier: str
    budget: float
    labelled: int
    """Labelled tiles."""
    per_seed: list[ClassificationMetrics]
    settings: list[dict[str, float]]
    """Setting that each seed's classifier ended with: C, the epoch, or k."""
    interval: Interval
    """95 % interval of the accuracy averaged over seeds (``statistics.bootstrap_interval``)."""
    test: str = ""
    """Name of the test set."""
    right_SN: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool), repr=False, compare=False)
    """True where seed s classified test tile n correctly, for paired comparisons."""
    units: Units | None = field(default=None, repr=False, compare=False)
    """Units that the test tiles are resampled by; None takes single tiles."""

    def mean_sd(self, score: str) -> tuple[float, float]:
        """Mean and sample sd over seeds of a score of ``ClassificationMetrics``."""
        return mean_sd([metrics.scores()[score] for metrics in self.per_seed])

    @property
    def confusion(self) -> npt.NDArray[np.int64]:
        """Counts summed over seeds, (K, K): row = label, column = prediction."""
        return np.asarray(np.sum([metrics.confusion for metrics in self.per_seed], axis=0), np.int64)


def score_row(
    features: str, classifier: str, budget: float, labelled: int, labels_N: npt.NDArray[np.int64],
    probabilities: Sequence[npt.NDArray[Any]], settings: list[dict[str, float]], units: Units | None, test: str = "",
) -> Row:  # fmt: skip
    """A row with every score of one prediction a seed.

    Args:
        features: what was classified, or what the classifier started from.
        classifier: name of the classifier.
        budget: label budget.
        labelled: labelled tiles.
        labels_N: true classes of the test tiles.
        probabilities: class probabilities (N, K) of each seed.
        settings: what each seed's classifier ended with.
        units: what the test tiles are resampled by; None takes single tiles.
        test: name of the test set.
    """
    right_SN = np.stack([found.argmax(axis=1) == labels_N for found in probabilities])
    per_seed = [classification_metrics(labels_N, found) for found in probabilities]
    interval = bootstrap_interval(right_SN, units)
    return Row(features, classifier, budget, labelled, per_seed, settings, interval, test, right_SN, units)
