"""Label budgets and folds, stratified and seeded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from ca2cl.errors import InputError
from ca2cl.evaluation.protocol import HONEST, Protocol

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
Subsets = Mapping[float, Sequence[IntArray]]
"""Rows of the training features that count as labelled: budget → one array a seed."""
# Streams of random words beside those of the classes, which are their labels.
_SLIDES, _REPLACED, _UNLABELLED, _SPLIT, _ANY = 1 << 32, 1 << 33, 1 << 34, 1 << 35, 1 << 36


def check_budgets(budgets: Sequence[float]) -> None:
    """Refuse a setting ``labels`` without budgets, or with one that ``check_budget`` refuses."""
    if not budgets:
        raise InputError("labels is empty: give at least one budget, such as 0.1")
    for budget in budgets:
        check_budget(budget)


def check_budget(budget: float) -> None:
    """Refuse what is neither a fraction of the labels nor a whole number of tiles a class.

    Raises:
        InputError: 0, negative, not finite, or above 1 without being whole.
    """
    if not math.isfinite(budget) or budget <= 0 or (budget > 1 and budget != int(budget)):
        raise InputError(
            f"labels is {budget!r}: use a fraction above 0 and up to 1, or a whole number of tiles a class from 2 up"
        )


def describe_budget(budget: float) -> str:
    """``1 %`` for a fraction, ``20/class`` for a number of tiles a class."""
    return f"{budget * 100:g} %" if budget <= 1 else f"{int(budget)}/class"


def budget_name(budget: float) -> str:
    """The same as a part of a file's name."""
    return describe_budget(budget).replace(" %", "pct").replace("/", "-per-")


def labelled_subset(
    labels_N: IntArray, budget: float, seed: int, groups: Sequence[str | None] | None = None
) -> IntArray:  # fmt: skip
    """Row numbers of a stratified labelled subset, ascending, without replacement.

    Every class present gives ``round(budget * n)`` of its n tiles (halves up, at least one) for a fraction, or
    ``min(budget, n)`` tiles for a number above 1. Each class is shuffled once a seed and its first tiles are taken, so
    for one seed a smaller budget's subset lies inside a larger one's, and budgets are compared on the same draw.

    Args:
        labels_N: class of every tile, shape (N,).
        budget: a fraction in (0, 1], or a whole number of tiles a class above 1.
        seed: 0 or more; another seed is another draw.
        groups: slide or patient of every tile. The slides are then shuffled, the same for all classes, and a class
            gives all its tiles of one before any of the next: few labels are those of few slides, as in a clinic.
            Tiles without one are slides of their own.

    Raises:
        InputError: the budget is neither.
    """
    check_budget(budget)
    place_N = np.zeros(len(labels_N), np.int64) if groups is None else _places(groups, seed)
    chosen = []
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        shuffled = rows[_permutation(len(rows), seed, int(label))]
        shuffled = shuffled[np.argsort(place_N[shuffled], kind="stable")]
        chosen.append(shuffled[: _wanted(budget, len(rows))])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def replaced_subset(labels_N: IntArray, budget: float, seed: int) -> IntArray:
    """As many rows of every class as ``labelled_subset`` takes, ascending, but drawn *with* replacement.

    A tile may come several times, so there are fewer different ones: of a whole class about 63 % (1 - 1/e). It is here
    to repeat what others did, not to be used.

    Raises:
        InputError: as ``labelled_subset``.
    """
    check_budget(budget)
    chosen = []
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        words = _words(_wanted(budget, len(rows)), seed, _REPLACED + int(label))
        chosen.append(rows[(words % np.uint64(len(rows))).astype(np.int64)])
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, np.int64)


def draw_subsets(
    labels_N: IntArray,
    budgets: Sequence[float],
    seeds: int,
    *,
    groups: Sequence[str | None] | None = None,
    protocol: Protocol = HONEST,
) -> Subsets:
    """The labelled rows for every budget and for seeds 0..seeds-1; the budget with the fewest tiles comes first.

    Args:
        groups: slide or patient of every row, for a draw by slide (``labelled_subset``).
        protocol: whether a tile may be drawn twice; slides then play no part.
    """

    def draw(budget: float, seed: int) -> IntArray:
        if protocol.replacement:
            return replaced_subset(labels_N, budget, seed)
        return labelled_subset(labels_N, budget, seed, groups)

    drawn = {budget: [draw(budget, seed) for seed in range(seeds)] for budget in set(budgets)}
    return dict(sorted(drawn.items(), key=lambda entry: (len(entry[1][0]), entry[0])))


def split_off(count: int, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Mask (count,) of rows that are split off: that share of them, whatever their class or slide."""
    split = np.zeros(count, bool)
    split[_permutation(count, seed, _SPLIT)[: int(share * count)]] = True
    return split


def replaced_rows(rows: IntArray, share: float, seed: int) -> IntArray:
    """That share of ``rows``, ascending, drawn *with* replacement and whatever their class: one may be missing.

    It is here to repeat what others did, not to be used.
    """
    words = _words(max(1, int(share * len(rows))), seed, _ANY)
    return np.sort(rows[(words % np.uint64(len(rows))).astype(np.int64)])


def stratified_sample(labels_N: IntArray, count: int, seed: int) -> IntArray:
    """At most ``count`` row numbers, ascending, without replacement, every label with its share of them.

    Each label's rows are shuffled by the seed, and the rows that stand earliest in their label's shuffled line, as a
    share of its length, are taken: so a rare label keeps its first row for as long as ``count`` allows it.

    Args:
        labels_N: label of every row, shape (N,); rows without one (-1) are a label of their own.
    """
    place_N = np.empty(len(labels_N), np.float64)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        # a stream of its own for -1, which is no key
        order = _permutation(len(rows), seed, int(label) if label >= 0 else _UNLABELLED)
        place_N[rows[order]] = np.arange(len(rows)) / len(rows)
    return np.sort(np.argsort(place_N, kind="stable")[:count])


def _wanted(budget: float, held: int) -> int:
    """Tiles that a class of ``held`` gives."""
    return max(1, math.floor(budget * held + 0.5)) if budget <= 1 else min(int(budget), held)


def _places(groups: Sequence[str | None], seed: int) -> IntArray:
    """Place of every tile's slide among the shuffled ones, (N,)."""
    slides, slide_N = np.unique(np.asarray(known_slides(groups) or range(len(groups)), str), return_inverse=True)
    place = np.empty(len(slides), np.int64)
    place[_permutation(len(slides), seed, _SLIDES)] = np.arange(len(slides))
    return place[slide_N]


def stratified_folds(labels_N: IntArray, folds: int, seed: int) -> IntArray:
    """Fold of every tile, shape (N,), in 0..folds-1.

    A class is dealt round as evenly as it goes: in no class do two folds differ by more than one tile, and where every
    class has at least ``folds`` tiles every fold holds every class.
    """
    fold_N = np.empty(len(labels_N), np.int64)
    for label in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == label)
        fold_N[rows[_permutation(len(rows), seed, int(label))]] = np.arange(len(rows)) % folds
    return fold_N


def known_slides(groups: Sequence[str | None], title: str = "") -> list[str] | None:
    """The slide or patient of every tile, or None where no tile has one. A tile without one is a slide of its own.

    Who names slides believes that they are kept apart: one file that the pattern misses must not end that. Asked once
    of a whole set, and not of each draw of it: a row of a table is to follow one rule.

    Args:
        title: of the set, for a warning that counts the tiles without a slide; none without a title.
    """
    loose = sum(group is None for group in groups)
    if loose == len(groups):
        return None
    if loose and title:
        logger.warning(
            "%s: %d of %d labelled tiles have no slide or patient; each counts as a slide of its own",
            title,
            loose,
            len(groups),
        )
    return [f"slide {group}" if group is not None else f"tile {row}" for row, group in enumerate(groups)]


def slide_folds(labels_N: IntArray, slides: Sequence[str], folds: int, seed: int) -> IntArray:
    """Fold of every tile, shape (N,), such that no slide or patient lies in two folds and every fold has about its
    share of every class. With fewer slides than ``folds`` there are as many folds as slides.

    Args:
        labels_N: class of every tile.
        slides: slide or patient of every tile.
        folds: wanted.
        seed: of the draw.

    Raises:
        ValueError: no class has as many tiles as there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold  # loaded where it is needed: it takes a second

    folds = min(folds, len(set(slides)))
    fold_N = np.zeros(len(labels_N), np.int64)
    if folds > 1:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        for fold, (_, held) in enumerate(splitter.split(labels_N, labels_N, np.asarray(slides, str))):
            fold_N[held] = fold
    return fold_N


def _permutation(count: int, seed: int, stream: int) -> IntArray:
    return np.argsort(_words(count, seed, stream), kind="stable").astype(np.int64)


def _words(count: int, seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """Random words that are the same in every version of numpy: only a bit generator's raw stream is guaranteed."""
    # https://numpy.org/neps/nep-0019-rng-policy.html: Generator.permutation may change, Philox's words may not
    return np.asarray(np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(count), np.uint64)
