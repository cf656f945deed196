"""Expected calibration error, Brier score and log-loss of class probabilities.

Legend: N tiles, K classes, G slides (or patients, or single tiles), M bins.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
Probabilities = npt.NDArray[np.floating[Any]]
BINS = 15
LEAST = 1e-12
"""A float32 probability can underflow to 0: one certain mistake must not outweigh every other tile."""


@dataclass(frozen=True)
class CalibrationErrors:
    """Errors of one classifier's probabilities on one test set; 0 is best."""

    calibration_error: float
    """ECE of Guo et al. (ICML 2017): mean gap between confidence and accuracy over 15 bins of equal width, weighted by
    their tiles. It is above 0 by chance, also for perfect probabilities."""
    calibration_error_debiased: float
    """Root of the mean squared gap over 15 bins of equally many tiles, less what chance adds to it (Kumar, Liang and
    Ma, NeurIPS 2019). Chance is that of whole slides where they are known."""
    brier: float
    """Mean squared distance of the probabilities from the label's indicator, summed over classes, in [0, 2] (Brier,
    1950)."""
    log_loss: float
    """Mean negative log-likelihood of the labels, in nats."""


ERRORS = tuple(field.name for field in dataclasses.fields(CalibrationErrors))


def calibration_errors(labels_N: IntArray, p_NK: Probabilities, unit_N: IntArray) -> CalibrationErrors:
    """All errors.

    Args:
        labels_N: true classes.
        p_NK: their probabilities, which sum to 1.
        unit_N: number 0..G-1 of each tile's slide.
    """
    return CalibrationErrors(
        calibration_error=expected_calibration_error(labels_N, p_NK),
        calibration_error_debiased=debiased_error(labels_N, p_NK, unit_N),
        brier=float(brier_scores(labels_N, p_NK).mean()),
        log_loss=float(log_losses(labels_N, p_NK).mean()),
    )


def brier_scores(labels_N: IntArray, p_NK: Probabilities) -> Numbers:
    """Brier score (N,) of every tile."""
    off_NK = p_NK.astype(np.float64)
    off_NK[np.arange(len(labels_N)), labels_N] -= 1
    return np.asarray(np.square(off_NK).sum(axis=1), np.float64)


def log_losses(labels_N: IntArray, p_NK: Probabilities) -> Numbers:
    """Negative log-likelihood (N,) of every tile's label."""
    p_N = p_NK[np.arange(len(labels_N)), labels_N].astype(np.float64)
    return np.asarray(-np.log(np.maximum(p_N, LEAST)), np.float64)


def confidence_and_hit(labels_N: IntArray, p_NK: Probabilities) -> tuple[Numbers, Numbers]:
    """Probability (N,) of the predicted class, and 1 where it is the label, otherwise 0."""
    predicted_N = p_NK.argmax(axis=1)
    confidence_N = p_NK[np.arange(len(labels_N)), predicted_N].astype(np.float64)
    return confidence_N, (predicted_N == labels_N).astype(np.float64)


def equal_width_bins(confidence_N: Numbers, bins: int = BINS) -> IntArray:
    """Bin (N,) of every confidence: bin m is the interval (m / M, (m + 1) / M]."""
    return np.clip(np.ceil(confidence_N * bins - 1e-9).astype(np.int64) - 1, 0, bins - 1)


def equal_mass_bins(confidence_N: Numbers, bins: int = BINS) -> IntArray:
    """Bin (N,) of every confidence, such that bins hold equally many tiles; equal confidences share the lowest of
    their bins."""
    ranked_N = np.sort(confidence_N)
    place_N = np.searchsorted(ranked_N, confidence_N)
    return np.asarray(place_N * bins // max(1, len(confidence_N)), np.int64)


def expected_calibration_error(labels_N: IntArray, p_NK: Probabilities, bins: int = BINS) -> float:
    """ECE of the predicted class over bins of equal width."""
    confidence_N, hit_N = confidence_and_hit(labels_N, p_NK)
    gap_M = np.bincount(equal_width_bins(confidence_N, bins), confidence_N - hit_N, minlength=bins)
    return float(np.abs(gap_M).sum() / len(labels_N))


def debiased_error(labels_N: IntArray, p_NK: Probabilities, unit_N: IntArray, bins: int = BINS) -> float:
    """Root mean squared gap over bins of equally many tiles, less the gaps' variances; 0 where chance explains all.

    The variance of a bin's gap is that of its slides. A bin of a single slide has none, and adds nothing.
    """
    confidence_N, hit_N = confidence_and_hit(labels_N, p_NK)
    bin_N, gap_N = equal_mass_bins(confidence_N, bins), confidence_N - hit_N
    total = 0.0
    for number in np.unique(bin_N):
        inside_N = bin_N == number
        gap, unit = gap_N[inside_N], np.unique(unit_N[inside_N], return_inverse=True)[1]
        slides, tiles = int(unit.max()) + 1, len(gap)
        if slides > 1:
            off_G = np.bincount(unit, gap - gap.mean())
            chance = slides / (slides - 1) * float(np.square(off_G).sum()) / tiles**2
            total += tiles * (float(gap.mean()) ** 2 - chance)
    return float(max(0.0, total / len(labels_N)) ** 0.5)
