"""Row of a result table: scores over seeds with their intervals.

Legend: S seeds, N test tiles, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.calibration.probability_errors import (
    brier_scores,
    calibration_errors,
    confidence_and_hit,
    equal_width_bins,
    log_losses,
)
from ca2cl.evaluation.calibration.reliability import Bin
from ca2cl.evaluation.calibration.summary import SCALED, Calibration
from ca2cl.evaluation.calibration.temperature import scaled_by
from ca2cl.evaluation.metrics import (
    ClassificationMetrics,
    ClassRecall,
    class_recalls,
    classification_metrics,
    mean_sd,
    score_intervals,
)
from ca2cl.evaluation.statistics import Interval, Units, bootstrap_interval, mean_interval, ratio_score, score_interval

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
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """95 % intervals of the other scores averaged over seeds, by name; empty in results of earlier versions."""
    recalls: Sequence[ClassRecall] = ()
    """One a class; empty in results of earlier versions."""
    calibration: Calibration | None = None
    """None in results of earlier versions."""

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
    temperatures: Sequence[float | None] = (),
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
        temperatures: of each seed, chosen on held-out labelled tiles; None where there were none.
    """
    right_SN = np.stack([found.argmax(axis=1) == labels_N for found in probabilities])
    per_seed = [classification_metrics(labels_N, found) for found in probabilities]
    interval = bootstrap_interval(right_SN, units)
    of_tiles = units or Units.of(None, len(labels_N))
    calibration, errors = _calibrate(labels_N, probabilities, temperatures, of_tiles)
    return Row(
        features, classifier, budget, labelled, per_seed, settings, interval, test, right_SN, units,
        intervals={**score_intervals(labels_N, probabilities, of_tiles), **errors},
        recalls=class_recalls(labels_N, probabilities, of_tiles),
        calibration=calibration,
    )  # fmt: skip


def _calibrate(
    labels_N: npt.NDArray[np.int64], probabilities: Sequence[npt.NDArray[Any]], temperatures: Sequence[float | None],
    units: Units,
) -> tuple[Calibration, dict[str, Interval]]:  # fmt: skip
    """Calibration of the predictions, and the intervals of its means over tiles."""
    known = [one for one in temperatures if one is not None]
    known = known if len(known) == len(probabilities) else []
    scaled = [scaled_by(p_NK, one) for p_NK, one in zip(probabilities, known, strict=True)] if known else []
    intervals: dict[str, Interval] = {}
    for prefix, found in (("", probabilities), (SCALED, scaled)):
        for name, of_tiles in (("brier", brier_scores), ("log_loss", log_losses)):
            if found:
                intervals[prefix + name] = mean_interval([of_tiles(labels_N, p_NK) for p_NK in found], units)
    calibration = Calibration(
        raw=[calibration_errors(labels_N, p_NK, units.unit_N) for p_NK in probabilities],
        raw_bins=reliability(labels_N, probabilities, units),
        temperatures=known,
        scaled=[calibration_errors(labels_N, p_NK, units.unit_N) for p_NK in scaled],
        scaled_bins=reliability(labels_N, scaled, units),
    )
    return calibration, intervals


def reliability(
    labels_N: npt.NDArray[np.int64], probabilities: Sequence[npt.NDArray[Any]], units: Units
) -> list[Bin]:  # fmt: skip
    """Bins of the reliability diagram that are not empty, over all seeds, with 95 % bands by whole slides.

    Args:
        labels_N: true classes.
        probabilities: class probabilities (N, K) of each seed.
        units: what tiles are resampled by.
    """
    pairs = [confidence_and_hit(labels_N, p_NK) for p_NK in probabilities]
    places = [equal_width_bins(confidence_N) for confidence_N, _ in pairs]
    bins = []
    for number in sorted({int(one) for place_N in places for one in np.unique(place_N)}):
        inside = [place_N == number for place_N in places]
        right = [one * hit_N for one, (_, hit_N) in zip(inside, pairs, strict=True)]
        sure = [one * confidence_N for one, (confidence_N, _) in zip(inside, pairs, strict=True)]
        held_G, right_G, sure_G = (_sums(of_tiles, units).sum(axis=0) for of_tiles in (inside, right, sure))
        count, band = float(held_G.sum()), score_interval(ratio_score(right_G[None, :, None], held_G[None, :, None]))
        bins.append(Bin(number, int(count), float(sure_G.sum()) / count, float(right_G.sum()) / count, *band))
    return bins


def _sums(values: Sequence[npt.NDArray[Any]], units: Units) -> npt.NDArray[np.float64]:
    """Sums (S, G) over the tiles of a slide of values (N,) of each seed."""
    return np.stack([np.bincount(units.unit_N, one, minlength=units.count).astype(np.float64) for one in values])
