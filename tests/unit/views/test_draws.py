"""Counter-based randomness: the right bits, and statistically what it claims."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.views.draw.random import Draws, mix, word_of

_KEYS = np.arange(20_000)


def _mix_unsigned(x: Any) -> Any:
    """SplitMix64 as published, on unsigned words."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


class _OneView(Draws):
    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> Any:  # its one row
        rows: Any = super().uniform(name, low, high)
        return rows[0]


def _draws(keys: Any = _KEYS, seed: int = 0, epoch: int = 0, view: str = "strong") -> Draws:
    return _OneView(keys, seed=seed, epoch=epoch, views=[view], names=["a", "b"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40))
def test_mix_is_splitmix64_on_unsigned_words(words: list[int]) -> None:
    unsigned = np.array(words, dtype=np.int64).view(np.uint64)
    assert np.array_equal(mix(unsigned), _mix_unsigned(unsigned))


def test_mix_of_the_published_generator() -> None:
    # The first outputs of SplitMix64 seeded with 1234567 (the reference sequence of the JDK's and of Vigna's code).
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    states = [(1234567 + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(3)]
    assert mix(np.array(states, dtype=np.uint64)).tolist() == expected


def test_uniform_fills_its_range_evenly() -> None:
    values = _draws().uniform("a", -2.0, 3.0)
    assert values.min() >= -2.0 and values.max() < 3.0
    counts, _ = np.histogram(values, 20, (-2.0, 3.0))
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 50  # 19 degrees of freedom: exceeded once in 10 000 times


@pytest.mark.parametrize(
    "other",
    [
        _draws(epoch=1).uniform("a"),
        _draws(seed=1).uniform("a"),
        _draws(view="weak").uniform("a"),
        _draws().uniform("b"),
        _draws(_KEYS + 1).uniform("a"),
        _draws(_KEYS * 2).uniform("a"),
    ],
    ids=["epoch", "seed", "view", "draw", "next key", "doubled key"],
)
def test_streams_do_not_correlate(other: Any) -> None:
    mine = _draws().uniform("a")
    correlation = np.corrcoef(mine, other)[0, 1]
    assert abs(correlation) < 0.03  # four standard deviations at 20 000 samples
    assert not np.array_equal(mine, other)


def test_draws_are_repeatable_and_belong_to_the_key() -> None:
    order = np.random.default_rng(0).permutation(len(_KEYS))
    assert np.array_equal(_draws(_KEYS[order]).uniform("a"), _draws().uniform("a")[order])


def test_views_that_are_drawn_together_are_those_drawn_alone() -> None:
    both = Draws(_KEYS, seed=0, epoch=0, views=["strong", "weak"], names=["c", "a"]).uniform("a")
    assert np.array_equal(both[0], _draws().uniform("a")) and np.array_equal(both[1], _draws(view="weak").uniform("a"))


def test_chance_and_choice_have_their_frequencies() -> None:
    draws = Draws(_KEYS, seed=0, epoch=0, views=["strong"], names=["a"])
    assert abs(draws.chance("a", 0.7).mean() - 0.7) < 0.015
    assert abs(np.bincount(draws.choice("a", 4)[0]) - 5000).max() < 250
    assert not draws.chance("a", 0.0).any() and draws.chance("a", 1.0).all()


def test_words_of_names_differ_by_type_and_order() -> None:
    assert len({word_of(1, 2), word_of(2, 1), word_of("1", 2), word_of("1", "2"), word_of(12), word_of("12")}) == 6


def test_keys_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="int64"):
        Draws(cast(Any, np.zeros(3)), seed=0, epoch=0, views=["strong"], names=["a"])
