"""Probe features for a tile's centre or slide.

Legend: N tiles, T targets (centres or slides), D features, L classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.evaluation.centers.resampling import NONE, balanced_interval
from ca2cl.evaluation.features import FloatArray
from ca2cl.evaluation.splits import labelled_subset, slide_folds, stratified_folds
from ca2cl.evaluation.statistics import Interval, Units

IntArray = npt.NDArray[np.int64]
Classify = Callable[[FloatArray, IntArray, FloatArray], npt.NDArray[np.float64]]
"""Fitted features, their targets 0..T-1, held-out features → probabilities of the targets."""
FOLDS = 5
MOST_TILES = 5000
"""Tiles that take part, shared out evenly among the targets."""
MOST_SLIDES = 100
CLASS_ALONE = "class alone"
"""Floor: the best guess from a tile's class."""


@dataclass(frozen=True)
class Task:
    """Targets to predict, and which tiles are held out together."""

    what: str
    """centre or slide."""
    rows: IntArray
    """Tiles that take part, among those of the set."""
    target_N: IntArray
    """0..T-1, of these tiles."""
    names: list[str]
    fold_N: IntArray
    """Fold that a tile is held out in, 0 and up."""
    units: Units
    """Of the interval."""
    notes: list[str] = field(default_factory=list)

    @property
    def chance(self) -> float:
        """Balanced accuracy of a guess."""
        return 1 / len(self.names)


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of a classifier of the targets."""

    features: str
    classifier: str
    balanced_accuracy: float
    interval_95: Interval = NONE


def center_task(center_N: IntArray, names: Sequence[str], slides: Sequence[str] | None, seed: int = 0) -> Task | None:
    """Predict the centre with whole slides held out, or single tiles where slides are unknown; None with fewer than
    two centres of two slides.

    Args:
        center_N: centre of every tile, -1 where it has none.
        names: of the centres.
        slides: slide or patient of every tile, where known.
        seed: of the folds and of the tiles that take part.
    """
    known = np.flatnonzero(center_N >= 0)
    rows = known[labelled_subset(center_N[known], max(FOLDS, MOST_TILES // max(1, len(names))), seed)]
    group_N = np.asarray(slides, str)[rows] if slides is not None else rows.astype(str)
    kept = [t for t in range(len(names)) if len(np.unique(group_N[center_N[rows] == t])) > 1]
    notes = []
    if slides is None:
        notes.append("slides are not known: tiles of one slide are in both parts, and the centre is easier to predict")
    if left_out := [name for number, name in enumerate(names) if number not in kept]:
        notes.append(f"centres of a single slide are left out: {', '.join(left_out)}")
    inside = np.isin(center_N[rows], kept)
    rows, group_N = rows[inside], group_N[inside]
    if len(kept) < 2 or np.bincount(center_N[rows]).max() < FOLDS:
        return None
    target_N = np.searchsorted(kept, center_N[rows]).astype(np.int64)
    folds = (
        stratified_folds(target_N, FOLDS, seed)
        if slides is None
        else slide_folds(target_N, group_N.tolist(), FOLDS, seed)
    )
    units = Units.of(None if slides is None else group_N.tolist(), len(rows))
    return Task("centre", rows, target_N, [names[t] for t in kept], folds, units, notes)


def slide_task(slides: Sequence[str] | None, seed: int = 0) -> Task | None:
    """Predict the slide with a fifth of each slide's tiles held out in turn; None where fewer than two slides have
    ``FOLDS`` tiles.

    Args:
        slides: slide or patient of every tile, where known.
        seed: of the folds and of the slides and tiles that take part.
    """
    if slides is None:
        return None
    names, slide_N, counts = np.unique(np.asarray(slides, str), return_inverse=True, return_counts=True)
    large = np.flatnonzero(counts >= FOLDS)
    kept = np.sort(large[np.argsort(-counts[large], kind="stable")[:MOST_SLIDES]])
    if len(kept) < 2:
        return None
    rows = np.flatnonzero(np.isin(slide_N, kept))
    rows = rows[labelled_subset(slide_N[rows], max(FOLDS, MOST_TILES // len(kept)), seed)]
    target_N = np.searchsorted(kept, slide_N[rows]).astype(np.int64)
    notes = [f"{len(kept)} of {len(names)} slides, those with the most tiles and at least {FOLDS}"]
    held = [str(names[t]).removeprefix("slide ") for t in kept]
    return Task("slide", rows, target_N, held, stratified_folds(target_N, FOLDS, seed), Units(target_N, True), notes)


def scores(
    task: Task, features: Mapping[str, FloatArray], labels_N: IntArray, classifiers: Mapping[str, Classify]
) -> list[Score]:  # fmt: skip
    """The balanced accuracy of every classifier on every kind of features, and of the class alone.

    Args:
        task: what is predicted.
        features: by name, of all tiles of the set.
        labels_N: class of every tile of the set.
        classifiers: by name.
    """
    found = []
    for name, values_ND in features.items():
        for title, classify in classifiers.items():
            right_N = _predicted(task, values_ND[task.rows], classify) == task.target_N
            interval = balanced_interval(right_N, task.target_N, task.units)
            found.append(Score(name, title, balanced(right_N, task.target_N), interval))
    return [*found, Score(CLASS_ALONE, "best guess", class_alone(labels_N[task.rows], task.target_N))]


def balanced(right_N: npt.NDArray[np.bool_], target_N: IntArray) -> float:
    """Mean over targets of the share of their tiles that is right."""
    return float(np.mean([right_N[target_N == target].mean() for target in np.unique(target_N)]))


def class_alone(labels_N: IntArray, target_N: IntArray) -> float:
    """The highest balanced accuracy that any guess from the class alone has on these tiles: the mean over targets of
    P(class | target), summed over classes for the target where it is largest."""
    table_TL = np.zeros((target_N.max() + 1, labels_N.max() + 1))
    np.add.at(table_TL, (target_N, labels_N), 1)
    table_TL /= table_TL.sum(axis=1, keepdims=True)
    return float(table_TL.max(axis=0).sum() / len(table_TL))


def _predicted(task: Task, values_ND: FloatArray, classify: Classify) -> npt.NDArray[Any]:
    predicted_N = np.full(len(task.rows), -1)
    for fold in range(task.fold_N.max() + 1):
        held_N = task.fold_N == fold
        if not held_N.any() or held_N.all():
            continue
        targets, code_N = np.unique(task.target_N[~held_N], return_inverse=True)
        if len(targets) < 2:
            predicted_N[held_N] = targets[0]
            continue
        probabilities = classify(values_ND[~held_N], code_N.astype(np.int64), values_ND[held_N])
        # less the targets' own shares: a small centre is not outvoted, which balanced accuracy would punish
        predicted_N[held_N] = targets[(probabilities / np.bincount(code_N)).argmax(axis=1)]
    return predicted_N
