"""Logistic regression and k-NN on frozen features.

Legend: N labelled tiles, of which F are fitted and H held out; M test tiles, D features, K classes. Labels are 0..K-1
and every class has a labelled tile.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.calibration.temperature import fit_temperature
from ca2cl.evaluation.features import FloatArray, centred, mean_of, scaled
from ca2cl.evaluation.linear_head import LinearHead
from ca2cl.evaluation.protocol import HONEST, Protocol
from ca2cl.evaluation.splits import known_slides, slide_folds, stratified_folds, stratified_sample

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

Strength = float | Literal["auto"]
STRENGTHS = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)
"""Values of C, scikit-learn's inverse L2 strength, that are tried; ascending."""
DEFAULT_STRENGTH = 1.0
"""C where a class has fewer than ``FOLDS`` labelled tiles, too few to hold any out of every fold."""
FOLDS = 5
"""A fold is the fifth of the labelled tiles that is held out."""
HELD_OUT_TILES = 200
"""Folds are held out in turn until this many tiles have been, so that few labels do not mean a choice by five tiles;
where slides are known, all are."""
TEMPERATURE_TILES = 2000
"""Most tiles of a fold that choose a temperature."""
RISES = 2
"""The search stops when this many strengths in a row were worse than the best before them."""
MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class Prediction:
    """Class probabilities of the test tiles, shape (M, K), and the setting that the classifier ended with."""

    probabilities: npt.NDArray[np.float64]
    setting: dict[str, float]
    head: LinearHead | None = None
    """The fitted classifier, if it is a linear one."""
    temperature: float | None = None
    """Temperature that fits held-out labelled tiles; None where it was not asked for, or there are none."""


def logistic_regression(
    train_ND: FloatArray,
    labels_N: IntArray,
    test_MD: FloatArray,
    *,
    seed: int,
    strength: Strength = "auto",
    protocol: Protocol = HONEST,
    groups: Sequence[str | None] | None = None,
) -> Prediction:
    """Multinomial logistic regression by L-BFGS on features less the labelled tiles' mean, scaled to unit length.

    Centred, because features of one sign share most of their length; to unit length as in SimpleShot's CL2N
    (arXiv 1911.04623). On held-out training tiles of crc5 that and unit variance are level, each at its best strength
    (.644 and .638, ``python -m benchmarks.probe_settings``).

    Args:
        strength: C; or ``auto``, the one with the lowest mean log-loss on held-out *labelled* tiles (the smaller C of
            equals): log-loss, because a few held-out tiles cannot tell accuracies apart. Test tiles take no part in
            it. Held-out tiles of slides that are trained on reward a classifier for telling slides apart.
        seed: of the folds that ``auto`` holds out.
        groups: slide or patient of every labelled tile: ``auto`` then holds out whole ones.
    """
    if strength == "auto":
        chosen = protocol.holds_out
        strength = choose_strength(train_ND, labels_N, seed=seed, groups=groups) if chosen else DEFAULT_STRENGTH
    model = _model(strength)
    mean_D = mean_of(train_ND)
    _fit(model, scaled(train_ND, mean_D), labels_N)
    probabilities_MK = np.asarray(model.predict_proba(scaled(test_MD, mean_D)), np.float64)
    return Prediction(probabilities_MK, {"C": strength}, _head(model, mean_D))


def choose_strength(
    train_ND: FloatArray,
    labels_N: IntArray,
    *,
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
    groups: Sequence[str | None] | None = None,
) -> float:
    """The C of ``strengths`` that predicts held-out labelled tiles best; ``DEFAULT_STRENGTH`` with too few labels, or
    where no whole slide can be held out of those that are known.

    Args:
        train_ND: labelled features.
        labels_N: their classes.
        seed: of the folds.
        strengths: values of C to choose from.
        groups: slide or patient of every tile, where known.
    """
    folds = [
        (_model(strengths[0]), *centred(train_ND[~held_N], train_ND[held_N]), labels_N[~held_N], labels_N[held_N])
        for held_N in _held_in_turn(labels_N, groups, seed)
    ]
    if not folds:
        return DEFAULT_STRENGTH
    losses: list[float] = []
    for strength in strengths:
        losses.append(sum(_held_out_loss(strength, *fold) for fold in folds))
        # The loss falls and then rises with C, and the largest C take by far the longest to fit.
        if len(losses) > RISES and min(losses[-RISES:]) > min(losses[:-RISES]):
            break
    return float(strengths[int(np.argmin(losses))])


def _held_in_turn(
    labels_N: IntArray, groups: Sequence[str | None] | None, seed: int
) -> list[npt.NDArray[np.bool_]]:  # fmt: skip
    """Masks (N,) of the labelled tiles that are held out, one a fold."""
    if np.bincount(labels_N).min() < FOLDS:
        return []
    slides = None if groups is None else known_slides(groups)
    fold_N = stratified_folds(labels_N, FOLDS, seed) if slides is None else slide_folds(labels_N, slides, FOLDS, seed)
    masks = [fold_N == fold for fold in range(fold_N.max() + 1)]
    # a class may lie in few slides: what is left must still hold it
    masks = [held_N for held_N in masks if held_N.any() and len(np.unique(labels_N[~held_N])) == labels_N.max() + 1]
    # of slides all: one fold of them may hold few of the classes
    return masks[: math.ceil(HELD_OUT_TILES * FOLDS / len(labels_N))] if slides is None else masks


Fit = Callable[[FloatArray, IntArray, FloatArray], npt.NDArray[np.float64]]
"""Labelled features (N, D), their classes (N,) and other features (M, D) → the class probabilities (M, K) of those."""


def held_out_temperature(
    fit: Fit, train_ND: FloatArray, labels_N: IntArray, *, seed: int, groups: Sequence[str | None] | None = None
) -> float | None:
    """The temperature that fits the held-out tiles of all folds together, each predicted by a classifier of the other
    tiles; None with too few labels, or where no whole slide can be held out of those that are known.

    The folds are those that choose the strength of a logistic regression. Test tiles take no part in it.

    Args:
        fit: the classifier, with its settings.
        train_ND: labelled features.
        labels_N: their classes.
        seed: of the folds.
        groups: slide or patient of every tile, where known.
    """
    labels, probabilities = [], []
    for held_N in _held_in_turn(labels_N, groups, seed):
        rows = np.flatnonzero(held_N)
        rows = rows[stratified_sample(labels_N[rows], TEMPERATURE_TILES, seed)]
        labels.append(labels_N[rows])
        probabilities.append(fit(train_ND[~held_N], labels_N[~held_N], train_ND[rows]))
    return fit_temperature(np.concatenate(labels), np.concatenate(probabilities)) if labels else None


def _held_out_loss(
    strength: float, model: Any, fit_FD: FloatArray, held_HD: FloatArray, labels_F: IntArray, labels_H: IntArray
) -> float:
    """Summed log-loss of a fold's held-out tiles; the fit starts from the model's last one, at the strength before."""
    model.set_params(C=strength)
    _fit(model, fit_FD, labels_F)
    right_H = model.predict_proba(held_HD)[np.arange(len(labels_H)), labels_H]
    # A float32 probability can underflow to 0: one certain mistake must not outweigh every other tile.
    return float(-np.log(np.maximum(right_H, 1e-12)).sum())


def _model(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # loaded when a probe runs: it takes a second

    return LogisticRegression(C=strength, solver="lbfgs", max_iter=MAX_ITERATIONS, warm_start=True)


def _head(model: Any, mean_D: FloatArray) -> LinearHead:
    weight_KD, bias_K = np.asarray(model.coef_), np.asarray(model.intercept_)
    if len(weight_KD) == 1:  # of two classes: the log-odds of the second
        weight_KD, bias_K = (np.concatenate([np.zeros_like(one), one]) for one in (weight_KD, bias_K))
    return LinearHead(weight_KD, bias_K, mean_D)


def _fit(model: Any, train_ND: FloatArray, labels_N: IntArray) -> None:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(train_ND, labels_N)
    if any(issubclass(entry.category, ConvergenceWarning) for entry in caught):
        logger.warning("logistic regression with C = %g stopped after %d iterations", model.C, MAX_ITERATIONS)


def nearest_neighbours(train_ND: FloatArray, labels_N: IntArray, test_MD: FloatArray, *, k: int) -> Prediction:
    """The k nearest labelled tiles by cosine vote, each with its similarity as weight (0 where it is negative).

    Cosines are of features less the labelled tiles' mean, as for ``logistic_regression``: without that, features of one
    sign all point the same way (a random network's tiles have cosines near 1) and the vote is close to chance.

    Probabilities are shares of the votes and of one vote more that all classes share: no class is impossible. The
    weights have no temperature: it is nearly a majority vote with ties going to the nearer class. ``k`` is cut to the
    number of labelled tiles. A tile whose features equal the mean is equally far from all.

    Args:
        train_ND: labelled features.
        labels_N: their classes.
        test_MD: features to predict.
        k: neighbours that vote.
    """
    from sklearn.neighbors import KNeighborsClassifier

    k = min(k, len(train_ND))
    unit_ND, unit_MD = centred(train_ND, test_MD)
    # The floor lets a tile that is orthogonal to all its neighbours still get their majority.
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.maximum(1 - distance, 1e-9))
    votes_MK = np.asarray(model.fit(unit_ND, labels_N).predict_proba(unit_MD), np.float64)
    return Prediction((k * votes_MK + 1 / votes_MK.shape[1]) / (k + 1), {"k": float(k)})
