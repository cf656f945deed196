"""Drops between test sets: tile by tile, or by slides."""

from __future__ import annotations

import numpy as np
import pytest

from ca2cl.evaluation.centers.drop import TestTiles, drops, same_tiles
from ca2cl.evaluation.result import Row

GENERATOR = np.random.default_rng(0)
SLIDES = [f"slide {n // 10}" for n in range(300)]
KEYS = [f"a~t{n}" for n in range(300)]
LABELS = [0] * 300
RIGHT = GENERATOR.random((3, 300)) < np.repeat(GENERATOR.beta(6, 2, 30), 10)


def row(test: str, right: np.ndarray) -> Row:
    return Row("encoder", "linear", 1.0, 100, [], [], (0.0, 1.0), test, right)


def test_the_same_tiles_are_compared_one_by_one_whatever_their_order() -> None:
    worse = RIGHT & (np.arange(300) % 7 > 0)
    order = GENERATOR.permutation(300)
    tiles = {
        "norm": TestTiles(KEYS, LABELS, SLIDES),
        "nonorm": TestTiles([KEYS[n] for n in order], LABELS, [SLIDES[n] for n in order]),
    }
    (found,) = drops([row("norm", RIGHT), row("nonorm", worse[:, order])], tiles)
    assert (found.by, found.tiles, found.test) == ("tile", 300, "nonorm")
    assert found.mean == pytest.approx(float(RIGHT.mean() - worse.mean())) and found.interval_95[0] > 0
    elsewhere = TestTiles([f"b~{key}" for key in KEYS], LABELS, [f"other {slide}" for slide in SLIDES])
    (loose,) = drops([row("norm", RIGHT), row("other", worse)], {"norm": tiles["norm"], "other": elsewhere})
    assert loose.by == "group" and loose.mean == pytest.approx(found.mean)
    width, paired = (high - low for low, high in (loose.interval_95, found.interval_95))
    assert width > 1.5 * paired, "slides of two sets differ by chance, the same slides do not"
    shared = TestTiles([f"b~{key}" for key in KEYS], LABELS, SLIDES)
    (by_name,) = drops([row("norm", RIGHT), row("other", worse)], {"norm": tiles["norm"], "other": shared})
    low, high = by_name.interval_95
    assert by_name.by == "group" and high - low < 0.75 * width, "slides of one name are drawn together"


def test_a_key_of_another_class_is_another_tile() -> None:
    a, b = TestTiles(["x", "y", "z"], [0, 1, 2], None), TestTiles(["z", "y", "w"], [2, 0, 0], None)
    assert same_tiles(a, b) == ([2], [0])
    slides = [TestTiles(["x", "y"], [0, 0], slides) for slides in (["slide 1", "slide 2"], ["slide 1", "slide 3"])]
    assert same_tiles(*slides) == ([0], [0]), "image_1 of two slides is two tiles"


def test_the_interval_of_other_slides_covers_the_truth() -> None:
    """Equal sets of 40 slides each: the interval holds 0 in about 95 % of the worlds."""
    held = 0
    for world in range(40):
        generator = np.random.default_rng(world)
        right = [generator.random((1, 200)) < np.repeat(generator.beta(4, 2, 40), 5) for _ in range(2)]
        slides = [[f"slide {name}{n // 5}" for n in range(200)] for name in "ab"]
        tiles = {n: TestTiles([f"{n}{t}" for t in range(200)], [0] * 200, s) for n, s in zip("ab", slides, strict=True)}
        (found,) = drops([row("a", right[0]), row("b", right[1])], tiles)
        held += found.interval_95[0] <= 0 <= found.interval_95[1]
    assert held >= 34


def test_one_set_has_no_drop() -> None:
    assert drops([row("a", RIGHT)], {"a": TestTiles(KEYS, LABELS, SLIDES)}) == []
