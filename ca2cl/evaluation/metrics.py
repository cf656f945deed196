"""Classification metrics: accuracy, balanced accuracy, F1, AUROC, confusion matrix.

Legend: N test tiles, K classes, S seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

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
    _check(labels_N, probabilities_NK)
    classes = probabilities_NK.shape[1]
    predictions_N = probabilities_NK.argmax(axis=1)
    confusion = np.bincount(labels_N * classes + predictions_N, minlength=classes**2).reshape(classes, classes)
    hits, held, predicted = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    seen = (held + predicted) > 0
    recall = _share(hits, held)
    return ClassificationMetrics(
        accuracy=float(hits.sum() / len(labels_N)),
        balanced_accuracy=float(recall[held > 0].mean()),
        macro_f1=float(_share(2 * hits, held + predicted)[seen].mean()),  # 2PR / (P + R) with its fractions cleared
        macro_precision=float(_share(hits, predicted)[seen].mean()),
        macro_recall=float(recall[seen].mean()),
        macro_auroc=_macro_auroc(labels_N, probabilities_NK),
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


def _share(part: IntArray, whole: IntArray) -> npt.NDArray[np.float64]:
    """part / whole, 0 where whole is 0."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _macro_auroc(labels_N: IntArray, scores_NK: FloatArray) -> float:
    areas = [
        _auroc(labels_N == label, scores_NK[:, label])
        for label in range(scores_NK.shape[1])
        if 0 < np.count_nonzero(labels_N == label) < len(labels_N)
    ]
    return float(np.mean(areas)) if areas else float("nan")


def _auroc(positive_N: npt.NDArray[np.bool_], score_N: FloatArray) -> float:
    """P(a positive's score > a negative's) + ½ P(equal): Mann and Whitney's U over the number of pairs."""
    _, place_N, ties = np.unique(score_N, return_inverse=True, return_counts=True)
    rank = np.cumsum(ties) - (ties - 1) / 2  # 1-based, the mean rank where scores are equal
    positives = int(positive_N.sum())
    u = rank[place_N][positive_N].sum() - positives * (positives + 1) / 2
    return float(u / (positives * (len(positive_N) - positives)))


def mean_sd(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) over seeds; the latter is ``nan`` for a single seed."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
