"""Classification metrics with intervals: accuracy, F1, AUROC, recalls, confusion matrix.

Legend: N test tiles, K classes, S seeds, G slides (or patients, or single tiles).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.statistics import Interval, Score, Units, ratio_score, score_interval

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassificationMetrics:
    """Scores of one classifier on one test set; shares in [0, 1], ``nan`` where a score is not defined."""

    accuracy: float
    """Top-1: correct tiles / all tiles. Equals micro F1."""
    balanced_accuracy: float
    """Mean recall of the classes that the test set holds."""
    macro_f1: float
    """Unweighted mean over classes of 2PR / (P + R), 0 where P + R is 0. A class counts when a tile has it as its
    label or as its prediction, as in scikit-learn."""
    macro_precision: float
    """Unweighted mean of the precision of the same classes, 0 for a class that is never predicted."""
    macro_recall: float
    """Unweighted mean of the recall of the same classes, 0 for a class that the test set does not hold."""
    macro_auroc: float
    """Unweighted mean over classes of the one-versus-rest area under the ROC curve, over the classes that the test set
    holds but does not consist of."""
    confusion: IntArray
    """(K, K) counts: row = label, column = prediction."""

    def scores(self) -> dict[str, float]:
        """Every score by name, without the confusion matrix."""
        return {name: value for name, value in asdict(self).items() if name != "confusion"}


def classification_metrics(labels_N: IntArray, probabilities_NK: FloatArray) -> ClassificationMetrics:
    """Every score from labels and class probabilities; the prediction is the most probable class, the first of equals.

    Args:
        labels_N: true classes in 0..K-1, shape (N,).
        probabilities_NK: one column a class, shape (N, K); any score that grows with the probability serves.

    Raises:
        ValueError: no tiles, shapes that do not fit, a label outside the columns, or a score that is not finite.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score  # takes a second

    _check(labels_N, probabilities_NK)
    classes, predictions_N = range(probabilities_NK.shape[1]), probabilities_NK.argmax(axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels_N, predictions_N, average="macro", zero_division=0.0
    )
    confusion = confusion_matrix(labels_N, predictions_N, labels=[*classes])
    held = confusion.sum(axis=1)
    areas = [
        roc_auc_score(labels_N == label, probabilities_NK[:, label])
        for label in classes
        if 0 < held[label] < len(labels_N)
    ]
    return ClassificationMetrics(
        accuracy=float(np.mean(labels_N == predictions_N)),
        balanced_accuracy=float((np.diag(confusion)[held > 0] / held[held > 0]).mean()),
        macro_f1=float(f1),
        macro_precision=float(precision),
        macro_recall=float(recall),
        macro_auroc=float(np.mean(areas)) if areas else float("nan"),
        confusion=confusion.astype(np.int64),
    )


def _check(labels_N: IntArray, probabilities_NK: FloatArray) -> None:
    if labels_N.ndim != 1 or probabilities_NK.ndim != 2 or len(labels_N) != len(probabilities_NK):
        raise ValueError(f"labels {labels_N.shape} and probabilities {probabilities_NK.shape}: need (N,) and (N, K)")
    if len(labels_N) == 0:
        raise ValueError("labels are empty: a score needs at least one tile")
    if labels_N.min() < 0 or labels_N.max() >= probabilities_NK.shape[1]:
        raise ValueError(
            f"labels lie in {labels_N.min()}..{labels_N.max()}: need 0..{probabilities_NK.shape[1] - 1}, one a column"
        )
    if not np.isfinite(probabilities_NK).all():
        raise ValueError("probabilities are not all finite: the classifier diverged")


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; the latter is ``nan`` for a single seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


@dataclass(frozen=True)
class ClassRecall:
    """Recall of a class: its correct tiles / all its tiles."""

    recall: float
    """Averaged over seeds; ``nan`` for a class without tiles."""
    interval: Interval
    """95 %, by whole slides; ``nan`` where fewer than two have the class."""
    tiles: int
    units: int
    """Slides (or patients, or single tiles) that have the class."""


def class_recalls(labels_N: IntArray, probabilities: Sequence[FloatArray], units: Units) -> list[ClassRecall]:
    """Recall of every class.

    Args:
        labels_N: true classes.
        probabilities: class probabilities (N, K) of each seed.
        units: what tiles are resampled by.
    """
    classes = probabilities[0].shape[1]
    right_SGK, held_GK, _ = _counts(labels_N, probabilities, units)
    found = []
    for label in range(classes):
        tiles = int(held_GK[:, label].sum())
        bottom_SG1 = np.repeat(held_GK[None, :, label, None], len(probabilities), axis=0)
        score = ratio_score(right_SGK[:, :, label, None], bottom_SG1)
        recall = float(score.value_S.mean()) if tiles else float("nan")
        interval = score_interval(score) if tiles else (float("nan"), float("nan"))
        found.append(ClassRecall(recall, interval, tiles, int((held_GK[:, label] > 0).sum())))
    return found


def score_intervals(labels_N: IntArray, probabilities: Sequence[FloatArray], units: Units) -> dict[str, Interval]:
    """95 % intervals of balanced accuracy, macro F1 and macro AUROC, averaged over seeds.

    Args:
        labels_N: true classes.
        probabilities: class probabilities (N, K) of each seed.
        units: what tiles are resampled by.
    """
    right_SGK, held_GK, predicted_SGK = _counts(labels_N, probabilities, units)
    held_SGK = np.broadcast_to(held_GK, right_SGK.shape)
    return {
        "balanced_accuracy": score_interval(ratio_score(right_SGK, held_SGK)),
        "macro_f1": score_interval(ratio_score(2 * right_SGK, held_SGK + predicted_SGK)),
        "macro_auroc": score_interval(auroc_score(labels_N, probabilities, units)),
    }


def _counts(labels_N: IntArray, probabilities: Sequence[FloatArray], units: Units) -> tuple[Any, Any, Any]:
    """Correct tiles (S, G, K) and tiles (G, K) of every slide and class, and predictions (S, G, K)."""
    classes, slides = probabilities[0].shape[1], units.count

    def counted(class_N: IntArray, weight_N: Any = None) -> Any:
        cells = np.bincount(units.unit_N * classes + class_N, weight_N, minlength=slides * classes)
        return cells.reshape(slides, classes).astype(np.float64)

    predictions = [found.argmax(axis=1) for found in probabilities]
    right_SGK = np.stack([counted(labels_N, predicted_N == labels_N) for predicted_N in predictions])
    return right_SGK, counted(labels_N), np.stack([counted(predicted_N) for predicted_N in predictions])


def auroc_score(labels_N: IntArray, probabilities: Sequence[FloatArray], units: Units) -> Score:
    """Macro AUROC, with how far it moves when a slide is left out.

    By the placements of tiles among those of the other side, summed over slides (Obuchowski, Biometrics 1997): that
    leaves out the pairs of tiles inside a slide.
    """
    held_K = np.bincount(labels_N, minlength=probabilities[0].shape[1])
    scored = [label for label, held in enumerate(held_K) if 0 < held < len(labels_N)]
    share_KG = [_share(labels_N == label, units) for label in scored]
    weight_G = np.mean(share_KG, axis=0) if scored else np.zeros(units.count)
    value_S, moved_SG = [], []
    for p_NK in probabilities:
        found = [_auroc(labels_N == label, p_NK[:, label], units) for label in scored]
        value_S.append(np.mean([value for value, _ in found]) if found else float("nan"))
        moved_SG.append(np.mean([moved_G for _, moved_G in found], axis=0) if found else np.zeros(units.count))
    return Score(np.array(value_S), np.stack(moved_SG), weight_G)


def _share(positive_N: Any, units: Units) -> Any:
    """Share (G,) of each slide in the pairs."""
    sides = [np.bincount(units.unit_N, side, minlength=units.count) / side.sum() for side in (positive_N, ~positive_N)]
    return (sides[0] + sides[1]) / 2


def _auroc(positive_N: Any, score_N: FloatArray, units: Units) -> tuple[float, Any]:
    """Area under the ROC curve, and how far (G,) it moves without each slide; a slide that has all tiles of a side
    counts as if it had none of them."""
    from scipy.stats import rankdata

    place_N = rankdata(score_N)
    for side_N in (positive_N, ~positive_N):
        place_N[side_N] -= rankdata(score_N[side_N])
        place_N[side_N] /= max(1, int((~side_N).sum()))
    place_N = np.where(positive_N, place_N, 1 - place_N)
    area, moved_G = float(place_N[positive_N].mean()), np.zeros(units.count)
    for side_N in (positive_N, ~positive_N):
        off_G = np.bincount(units.unit_N, np.where(side_N, place_N - area, 0), minlength=units.count)
        left_G = side_N.sum() - np.bincount(units.unit_N, side_N, minlength=units.count)
        moved_G += np.where(left_G > 0, off_G / np.maximum(left_G, 1), 0)
    return area, moved_G
