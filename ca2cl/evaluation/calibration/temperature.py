"""Temperature scaling of class probabilities (Guo et al., ICML 2017).

Legend: H held-out tiles, N tiles, K classes.
"""

from __future__ import annotations

import numpy as np

from ca2cl.evaluation.calibration.probability_errors import IntArray, Numbers, Probabilities

COLDEST, HOTTEST = 0.05, 20.0
_LEAST = 1e-30
"""Of a probability, whose logarithm is taken."""


def fit_temperature(labels_H: IntArray, p_HK: Probabilities) -> float:
    """The temperature under which held-out tiles are most likely, between 1/20 and 20.

    ln T has a standard normal prior, which counts as much as one or two tiles: without it, held-out tiles that are all
    predicted correctly would make every later prediction certain.

    Args:
        labels_H: true classes of tiles that the classifier was not trained on.
        p_HK: its probabilities for them.

    Raises:
        ValueError: no tiles.
    """
    from scipy.optimize import minimize_scalar

    if len(labels_H) == 0:
        raise ValueError("labels are empty: a temperature needs held-out tiles")
    logits_HK = _logits(p_HK)
    right_H = logits_HK[np.arange(len(labels_H)), labels_H]

    def loss(log_t: float) -> float:
        scaled_HK = logits_HK * np.exp(-log_t)  # the largest is 0
        likelihood = right_H * np.exp(-log_t) - np.log(np.exp(scaled_HK).sum(axis=1))
        return float(log_t**2 / 2 - likelihood.sum())

    found = minimize_scalar(loss, bounds=(np.log(COLDEST), np.log(HOTTEST)), method="bounded")
    return float(np.exp(found.x))


def scaled_by(p_NK: Probabilities, temperature: float) -> Numbers:
    """Probabilities (N, K) whose logits are divided by the temperature; the most probable class stays."""
    odds_NK = np.exp(_logits(p_NK) / temperature)
    return np.asarray(odds_NK / odds_NK.sum(axis=1, keepdims=True), np.float64)


def _logits(p_NK: Probabilities) -> Numbers:
    """Logits up to a constant a tile, the largest of which is 0."""
    log_NK = np.log(np.maximum(p_NK.astype(np.float64), _LEAST))
    return np.asarray(log_NK - log_NK.max(axis=1, keepdims=True), np.float64)
