"""Intervals and the test of a difference: against slow loops, numbers worked out by hand, and known truths."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from benchmarks.coverage import World, coverage, false_positives, over_draws
from ca2cl.evaluation.statistics import Difference, Units, bootstrap_interval, holm, paired_difference, sign_flip_p

SLIDES = ["a"] * 7 + ["b"] * 3 + ["c"] * 5 + ["d"] * 9 + ["e"]
RIGHT, OTHER = np.random.default_rng(0).random((2, 1, len(SLIDES))) < 0.7


@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(spread: float) -> None:
    """Thirty slides, ICC 0 and .07; the interval over single tiles holds it where slides do not matter, and only there.
    ``python -m benchmarks.coverage`` is the whole table."""
    correlation, tiles, _, ours = coverage(World(30, spread), 250, np.random.default_rng(0))
    assert ours >= 0.9
    if spread:
        assert 0.04 < correlation < 0.1 and tiles < 0.75


@pytest.mark.parametrize("spread", [0.0, 1.5])
def test_equals_are_called_different_in_one_of_twenty_cases(spread: float) -> None:
    tiles, p, interval = false_positives(World(30, spread), 500, np.random.default_rng(0))
    assert 0.03 <= p <= 0.07 and 0.03 <= interval <= 0.07
    if spread:
        assert tiles > 0.2, "McNemar's test, which takes tiles for independent"


@pytest.mark.parametrize("spread", [0.0, 0.07])
def test_five_draws_of_labels_are_no_more_than_five(spread: float) -> None:
    p, interval, held = over_draws(spread, 50, 200, np.random.default_rng(0))
    assert p <= 0.07 and interval <= 0.07 and held >= 0.9


def test_the_difference_s_interval_is_a_jackknife_of_slides_as_a_loop() -> None:
    gain = RIGHT[0].astype(int) - OTHER[0]
    left_out = [gain[[slide != name for slide in SLIDES]].mean() for name in "abcde"]
    variance = 4 / 5 * sum((one - gain.mean()) ** 2 for one in left_out)
    effective = len(SLIDES) ** 2 / sum(SLIDES.count(name) ** 2 for name in "abcde")
    half = t.ppf(0.975, effective - 1) * math.sqrt(variance)
    found = paired_difference(RIGHT, OTHER, Units.of(SLIDES, len(SLIDES)))
    assert found.interval == pytest.approx((gain.mean() - half, gain.mean() + half))


def test_the_interval_is_a_bootstrap_of_student_s_t_as_a_loop() -> None:
    generator = np.random.default_rng(5)
    sizes = generator.integers(5, 15, 12)
    slides = [f"s{n}" for n, size in enumerate(sizes) for _ in range(size)]
    of_slide = [generator.random(size) < share for size, share in zip(sizes, generator.beta(3, 1, 12), strict=True)]

    def logit_and_error(chosen: np.ndarray) -> tuple[float, float]:
        parts = [of_slide[slide] for slide in chosen]
        mean = np.concatenate(parts).mean()
        left_out = [np.concatenate([*parts[:n], *parts[n + 1 :]]).mean() for n in range(len(parts))]
        variance = (len(parts) - 1) / len(parts) * sum((one - mean) ** 2 for one in left_out)
        slope = mean * (1 - mean)
        return math.log(mean / (1 - mean)), math.sqrt(max(variance, slope / sizes.sum())) / slope

    center, error = logit_and_error(np.arange(12))
    drawn = [logit_and_error(generator.integers(0, 12, 12)) for _ in range(4000)]
    ends = np.quantile([(logit - center) / of for logit, of in drawn], [0.975, 0.025])
    alone = t.ppf(0.975, sizes.sum() ** 2 / np.square(sizes).sum() - 1)
    margins = -max(alone, ends[0]) * error, max(alone, -ends[1]) * error
    right = np.concatenate(of_slide)[None]
    found = bootstrap_interval(right, Units.of(slides, len(slides)), resamples=20_000)
    assert found == pytest.approx([1 / (1 + math.exp(-(center + margin))) for margin in margins], abs=0.01)


def test_without_slides_every_tile_is_one_of_its_own() -> None:
    alone = Units.of([f"slide {n}" for n in range(len(SLIDES))], len(SLIDES))
    assert bootstrap_interval(RIGHT) == pytest.approx(bootstrap_interval(RIGHT, alone))
    assert "tiles were resampled; no slides known" in Units.of(None, 3).statement
    assert "25 of them" in alone.statement and Units.of(SLIDES, 25).count == 5


def test_slides_are_the_sample_and_not_their_tiles() -> None:
    """The same slides at ten times the tiles say hardly more; ten times as many slides do."""
    generator = np.random.default_rng(1)
    accuracy = generator.beta(4, 2, 300)

    def width(slides: int, tiles: int) -> float:
        unit = np.repeat(np.arange(slides), tiles)
        low, high = bootstrap_interval((generator.random(len(unit)) < accuracy[unit])[None], Units(unit, known=True))
        return high - low

    assert width(30, 400) > 0.7 * width(30, 40)
    assert width(300, 40) < 0.5 * width(30, 40)


def test_what_no_variance_is_known_of_has_no_narrow_interval() -> None:
    one = Units.of(["a"] * 20, 20)
    assert all(math.isnan(bound) for bound in bootstrap_interval(np.ones((2, 20), bool), one))
    certain = bootstrap_interval(np.ones((5, 40), bool), Units.of([f"s{n // 4}" for n in range(40)], 40))
    assert certain == (pytest.approx(0.025 ** (1 / 10)), 1.0), "ten of ten slides, not forty of forty tiles"
    assert bootstrap_interval(np.zeros((1, 3), bool))[0] == 0.0


def test_one_draw_and_single_tiles_make_it_mcnemars_exact_test() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.random((1, 400)) < 0.7, generator.random((1, 400)) < 0.6
    found = paired_difference(a, b)
    assert (found.only_a, found.only_b) == (int((a & ~b).sum()), int((b & ~a).sum()))
    assert found.p == pytest.approx(binomtest(found.only_a, found.only_a + found.only_b).pvalue)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.interval[0] < found.mean < found.interval[1]


def test_few_slides_are_flipped_in_every_way() -> None:
    sums = np.array([5, -2, 7, 3, 0, 1, 1, -4])
    patterns = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=len(sums))]
    assert sign_flip_p(sums) == pytest.approx(np.mean(np.array(patterns) >= abs(sums.sum())))
    assert sign_flip_p(np.array([4, 1, 2])) == 0.25, "three slides cannot say more"
    assert sign_flip_p(np.array([0, 0])) == 1.0


def test_many_slides_are_flipped_by_lot() -> None:
    sums = np.random.default_rng(3).integers(-6, 9, 60)
    means = np.random.default_rng(4).choice([-1, 1], (100_000, 60)) @ sums
    expected = pytest.approx(np.mean(np.abs(means) >= abs(sums.sum())), abs=0.008)
    assert sign_flip_p(sums, flips=100_000) == expected
    assert sign_flip_p(sums) == sign_flip_p(sums)
    assert sign_flip_p(np.arange(1, 61)) == pytest.approx(1 / 10_001), "never 0"


def test_alike_classifiers_do_not_differ() -> None:
    found = paired_difference(RIGHT, RIGHT, Units.of(SLIDES, len(SLIDES)))
    assert (found.mean, found.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="compare the same seeds"):
        paired_difference(RIGHT, RIGHT[:, 1:])


def test_holm_by_hand() -> None:
    ps = [0.01, 0.04, 0.03, 0.005, 0.9]
    found = holm([Difference(0.0, (0.0, 0.0), 0, 0, p) for p in ps])
    assert [one.p for one in found] == ps
    assert [one.p_holm for one in found] == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert holm([]) == []
