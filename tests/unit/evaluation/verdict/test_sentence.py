"""What a verdict says, word for word, and what it never says."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ca2cl.evaluation.verdict.facts import Column, Facts, Gap, Level
from ca2cl.evaluation.verdict.sentence import verdict

COLOUR, RANDOM = "colour histogram", "random encoder"
COLUMNS = tuple(Column(classifier, budget) for classifier in ("linear", "k-NN") for budget in (0.1, 1.0))
AHEAD, BEHIND = (0.1, 0.05, 0.15, 0.001), (-0.1, -0.15, -0.05, 0.001)
HIGHER, LOWER, LEVEL = (0.1, 0.01, 0.2, 0.06), (-0.1, -0.2, -0.01, 0.06), (0.01, -0.05, 0.07, 0.8)
"""Difference, its interval, p."""


def facts(columns: tuple[Column, ...] = COLUMNS, **rivals: list[tuple[float, float, float, float]]) -> Facts:
    """Accuracies of .5 where chance is .1, and the differences of every rival, column by column."""
    gaps = [
        Gap(name, column, gap, (low, high), p)
        for name, found in rivals.items()
        for column, (gap, low, high, p) in zip(columns, found, strict=True)
    ]
    return Facts(tuple(Level(column, 0.5, (0.4, 0.6)) for column in columns), tuple(gaps), 0.1)


def both(colour: list[tuple[float, float, float, float]], random: list[tuple[float, float, float, float]]) -> Facts:
    return facts(**{COLOUR: colour, RANDOM: random})


@pytest.mark.parametrize(
    ("found", "outcome", "sentence"),
    [
        (both([AHEAD] * 4, [AHEAD] * 4), "ahead", "Ahead of both baselines with every classifier and label budget."),
        (
            both([BEHIND] * 4, [BEHIND] * 4),
            "behind",
            "Worse than both baselines with every classifier and label budget: train longer, or use stronger colour "
            "jitter.",
        ),
        (both([LEVEL] * 4, [LEVEL] * 4), "level", "Level with both baselines: no difference is significant."),
        (
            both([*[AHEAD] * 3, BEHIND], [AHEAD] * 4),
            "mixed",
            "Ahead of colour alone in 3 of 4 columns, but worse with k-NN and 100 % of the labels; ahead of random "
            "weights with every classifier and label budget. Train longer, or use stronger colour jitter.",
        ),
        (
            both([AHEAD, AHEAD, LEVEL, HIGHER], [HIGHER] * 4),
            "mixed",
            "Ahead of colour alone in 2 of 4 columns, no significant difference in the others; higher than random "
            "weights with every classifier and label budget, but not significantly.",
        ),
        (
            facts(**{"random": [LEVEL, LEVEL, BEHIND, BEHIND]}),
            "mixed",
            "Worse than random weights with k-NN at every label budget, no significant difference in the others: "
            "train longer.",
        ),
        (
            facts(**{"torchvision:IMAGENET1K_V1": [BEHIND, LEVEL, BEHIND, LEVEL], "0" * 32: [AHEAD] * 4}),
            "mixed",
            "Worse than ImageNet weights with 10 % of the labels by every classifier, no significant difference in the "
            "others; ahead of 00000000 with every classifier and label budget. Train longer, or start from ImageNet "
            "weights.",
        ),
        (
            facts(COLUMNS[:2], random=[LOWER, LOWER]),
            "level",
            "Lower than random weights at every label budget, but not significantly.",
        ),
        (
            facts((COLUMNS[0], Column("linear", 20.0)), random=[AHEAD, BEHIND]),
            "mixed",
            "Ahead of random weights in 1 of 2 columns, but worse with 20 labels a class: train longer.",
        ),
        (
            facts((COLUMNS[0], COLUMNS[2]), random=[AHEAD] * 2),
            "ahead",
            "Ahead of random weights with every classifier.",
        ),
        (facts(COLUMNS[:1], random=[AHEAD]), "ahead", "Ahead of random weights."),
        (facts(COLUMNS[:1], other=[BEHIND]), "behind", "Worse than other."),
        (
            facts(),
            "alone",
            "Above chance (0.100) with every classifier and label budget; compared with nothing else.",
        ),
    ],
)
def test_the_words(found: Facts, outcome: str, sentence: str) -> None:
    said = verdict(found)
    assert (said.outcome, said.sentence) == (outcome, sentence)


def test_chance_is_named_where_accuracy_is_not_above_it() -> None:
    found = both([AHEAD] * 4, [AHEAD] * 4)
    low = [replace(level, interval=(0.1, 0.3)) for level in found.levels]
    said = verdict(replace(found, levels=(low[0], *found.levels[1:])))
    assert said.sentence.endswith("label budget. Not above chance (0.100) with linear and 10 % of the labels.")
    said = verdict(replace(found, levels=tuple(low)))
    expected = "Nowhere significantly above chance (0.100): train longer."
    assert (said.outcome, said.sentence) == ("chance", expected)
    alone = verdict(replace(facts(), levels=(low[0], *found.levels[1:])))
    assert alone.sentence == "Above chance (0.100) in 3 of 4 columns; compared with nothing else."


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"leak": True}, "No verdict: there is a leak, so these numbers say little about new tiles."),
        (
            {"comparable": False},
            "No verdict: protocol original is for comparison with the authors' table alone.",
        ),
        (
            {"levels": (Level(COLUMNS[0], 0.5, (math.nan, math.nan)),)},
            "No verdict: all test tiles are of one slide or patient, so nothing is known about others.",
        ),
    ],
)
def test_what_cannot_be_compared_has_no_verdict(changes: dict[str, object], sentence: str) -> None:
    said = verdict(replace(both([AHEAD] * 4, [AHEAD] * 4), **changes))  # type: ignore[arg-type]
    assert (said.outcome, said.sentence, said.gaps) == ("none", sentence, ())


differences = st.tuples(
    st.floats(-0.5, 0.5), st.floats(0, 0.5), st.floats(0, 1) | st.just(math.nan)
).map(lambda drawn: (drawn[0], drawn[0] - drawn[1], drawn[0] + drawn[1], drawn[2]))  # fmt: skip
rows = st.lists(differences, min_size=4, max_size=4)


@given(rows, rows)
def test_a_claim_needs_a_significant_difference(
    colour: list[tuple[float, float, float, float]], random: list[tuple[float, float, float, float]]
) -> None:
    said = verdict(both(colour, random)).sentence.lower()
    drawn = [*colour, *random]
    assert ("ahead of" in said) == any(low > 0 and p < 0.05 for _, low, _, p in drawn)
    assert ("worse" in said) == any(high < 0 and p < 0.05 for _, _, high, p in drawn)
    assert said.count(".") >= 1 and "{" not in said and "  " not in said


@given(rows, rows)
def test_swapping_sides_swaps_the_outcome(
    colour: list[tuple[float, float, float, float]], random: list[tuple[float, float, float, float]]
) -> None:
    turned = [[(-gap, -high, -low, p) for gap, low, high, p in found] for found in (colour, random)]
    opposite = {"ahead": "behind", "behind": "ahead"}
    there, back = verdict(both(colour, random)).outcome, verdict(both(*turned)).outcome
    assert back == opposite.get(there, there)
