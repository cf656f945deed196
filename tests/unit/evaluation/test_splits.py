"""Labelled subsets and folds: stratified, without replacement, seeded, and the same on every machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.errors import InputError
from ca2cl.evaluation.splits import (
    check_budget,
    describe_budget,
    known_slides,
    labelled_subset,
    replaced_subset,
    stratified_folds,
)

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)
BUDGETS = st.one_of(st.floats(0.001, 1.0), st.integers(2, 30).map(float))


@given(LABELS, BUDGETS, st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_every_class_gives_its_share_once_and_at_least_one(labels: np.ndarray, budget: float, seed: int) -> None:
    rows = labelled_subset(labels, budget, seed)
    assert len(set(rows.tolist())) == len(rows)
    assert (np.diff(rows) > 0).all()
    for label in set(labels.tolist()):
        held, given_ = int((labels == label).sum()), int((labels[rows] == label).sum())
        wanted = max(1, int(budget * held + 0.5)) if budget <= 1 else min(int(budget), held)
        assert given_ == wanted


@given(LABELS, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_a_smaller_budget_lies_inside_a_larger_one(labels: np.ndarray, seed: int) -> None:
    nested = [set(labelled_subset(labels, budget, seed).tolist()) for budget in (0.05, 0.3, 1.0)]
    assert nested[0] <= nested[1] <= nested[2] == set(range(len(labels)))


def test_another_seed_is_another_draw() -> None:
    labels = np.repeat(np.arange(3), 100)
    draws = {tuple(labelled_subset(labels, 0.1, seed).tolist()) for seed in range(10)}
    assert len(draws) == 10


def test_the_draw_is_frozen() -> None:
    """A changed draw would silently change every published few-label number."""
    labels = np.tile(np.arange(2), 10)
    assert labelled_subset(labels, 0.2, 0).tolist() == [0, 4, 7, 11]


def test_every_tile_is_as_likely_as_any_other() -> None:
    labels = np.zeros(20, int)
    times = np.bincount(np.concatenate([labelled_subset(labels, 0.5, seed) for seed in range(400)]), minlength=20)
    assert abs(times - 200).max() < 50  # five standard deviations of a binomial(400, 1/2)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_budget_that_is_no_budget_is_refused(budget: float) -> None:
    with pytest.raises(InputError, match="labels is"):
        check_budget(budget)


def test_budgets_are_told_in_words() -> None:
    assert [describe_budget(b) for b in (0.01, 0.005, 1.0, 20)] == ["1 %", "0.5 %", "100 %", "20/class"]


@given(LABELS, st.integers(2, 6), st.integers(0, 100))
@settings(deadline=None, max_examples=100)
def test_folds_share_every_class_evenly(labels: np.ndarray, folds: int, seed: int) -> None:
    fold = stratified_folds(labels, folds, seed)
    for label in set(labels.tolist()):
        counts = np.bincount(fold[labels == label], minlength=folds)
        assert len(counts) == folds and counts.max() - counts.min() <= 1


GROUPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6)), min_size=1, max_size=80)


@given(GROUPS, BUDGETS, st.integers(0, 1000))
@settings(deadline=None, max_examples=150)
def test_a_class_gives_all_of_a_slide_before_any_of_the_next(
    tiles: list[tuple[int, int]], budget: float, seed: int
) -> None:
    labels, slides = np.array([label for label, _ in tiles]), [f"slide{slide}" for _, slide in tiles]
    rows = labelled_subset(labels, budget, seed, slides).tolist()
    assert len(rows) == len(labelled_subset(labels, budget, seed))
    order: list[str] = []  # of the slides, as the whole draw of every class shows it
    for label in set(labels.tolist()):
        chosen = {slides[row] for row in rows if labels[row] == label}
        left = {slides[row] for row in range(len(tiles)) if labels[row] == label and row not in rows}
        assert len(chosen & left) <= 1, "more than one slide was begun and not finished"
        order += sorted(chosen - left)
    assert set(order) <= set(slides)


def test_slides_come_in_one_order_for_all_classes_and_another_for_another_seed() -> None:
    labels, slides = np.tile([0, 1], 40), [f"s{row // 8}" for row in range(80)]  # ten slides of eight tiles
    firsts = []
    for seed in range(8):
        chosen = [
            {slides[row] for row in labelled_subset(labels, 4.0, seed, slides) if labels[row] == c} for c in (0, 1)
        ]
        assert chosen[0] == chosen[1] and len(chosen[0]) == 1
        firsts.append(chosen[0].pop())
    assert len(set(firsts)) > 3


def test_tiles_without_a_slide_are_drawn_one_by_one() -> None:
    labels = np.zeros(50, int)
    mixed = ["s"] * 25 + [None] * 25
    spread = [sum(mixed[row] is None for row in labelled_subset(labels, 0.2, seed, mixed)) for seed in range(40)]
    assert len(set(spread)) > 3


def test_one_tile_without_a_slide_leaves_the_others_apart() -> None:
    """One file that a pattern misses must not switch off the draw and the folds by slide."""
    mixed = ["a", "a", None, "b", None]
    assert known_slides(mixed) == ["slide a", "slide a", "tile 2", "slide b", "tile 4"]
    assert known_slides([None] * 3) is None
    assert known_slides(["tile 1", None]) == ["slide tile 1", "tile 1"], "a slide's name is not taken for a tile's"


def test_with_replacement_a_tile_comes_again_and_the_count_stays() -> None:
    labels = np.repeat(np.arange(3), 400)
    rows = replaced_subset(labels, 1.0, 0)
    assert np.bincount(labels[rows]).tolist() == [400, 400, 400]
    assert abs(len(np.unique(rows)) / 1200 - (1 - np.exp(-1))) < 0.05
    assert replaced_subset(labels, 1.0, 0).tolist() == rows.tolist() != replaced_subset(labels, 1.0, 1).tolist()
    assert np.bincount(labels[replaced_subset(labels, 0.01, 3)]).tolist() == [4, 4, 4]
