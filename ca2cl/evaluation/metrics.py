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
