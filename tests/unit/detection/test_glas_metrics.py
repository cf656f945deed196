"""The GlaS challenge's scores against cases computed by hand and against the paper's definition as slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ca2cl.detection.scores.glas_metrics import GlasScores, compare, glas_scores, pooled
from ca2cl.errors import InputError
from tests.support.gland_images import draw_glands
from tests.support.glands import Mask, disc


def strip(*runs: tuple[int, int, int], width: int = 40, height: int = 10) -> Mask:
    """A mask whose objects are full-height bars: (number, first column, end)."""
    mask = np.zeros((height, width), np.int64)
    for number, first, end in runs:
        mask[:, first:end] = number
    return mask


def scores(annotated: Mask, predicted: Mask) -> GlasScores:
    return glas_scores([(annotated, predicted)])


def test_a_perfect_prediction_with_other_numbers() -> None:
    annotated = strip((1, 0, 10), (2, 12, 20), (5, 30, 40))
    predicted = strip((900, 0, 10), (1, 12, 20), (70_000, 30, 40))
    assert scores(annotated, predicted) == GlasScores(1, 1, 1, 1, 0, 3, 0, 0)


def test_nothing_predicted() -> None:
    found = scores(strip((1, 0, 10), (2, 20, 30)), strip())
    assert found == GlasScores(0, 0, 0, 0, math.hypot(39, 9), 0, 0, 2)


def test_nothing_annotated() -> None:
    assert scores(strip(), strip((1, 0, 10))) == GlasScores(0, 0, 0, 0, math.hypot(39, 9), 0, 1, 0)


def test_nothing_at_all() -> None:
    assert scores(strip(), strip()) == GlasScores(1, 1, 1, 1, 0, 0, 0, 0)
    assert glas_scores([]) == GlasScores(1, 1, 1, 1, 0, 0, 0, 0)


def test_a_split_gland() -> None:
    """One gland of 20 columns, found as 12 and 8: the larger is right, the other a false positive."""
    found = scores(strip((1, 10, 30)), strip((1, 10, 22), (2, 22, 30)))
    assert (found.true_positives, found.false_positives, found.false_negatives) == (1, 1, 0)
    assert found.f1 == pytest.approx(2 / 3)
    # predicted: 12/20 of 2·12/32 and 8/20 of 2·8/28; annotated: its partner is the larger one
    assert found.dice == pytest.approx((0.6 * 24 / 32 + 0.4 * 16 / 28 + 24 / 32) / 2)
    # the farthest column of the gland is 8 from the larger part and 12 from the smaller
    assert found.hausdorff == pytest.approx((0.6 * 8 + 0.4 * 12 + 8) / 2)


def test_two_halves_of_a_gland_are_no_match() -> None:
    found = scores(strip((1, 10, 30)), strip((1, 10, 20), (2, 20, 30)))
    assert (found.true_positives, found.false_positives, found.false_negatives) == (0, 2, 1)


def test_a_merged_pair() -> None:
    """Glands of 12 and 8 columns, found as one of 20: it is the larger one's, the other is missed."""
    found = scores(strip((1, 10, 22), (2, 22, 30)), strip((1, 10, 30)))
    assert (found.true_positives, found.false_positives, found.false_negatives) == (1, 0, 1)
    assert found.dice == pytest.approx((24 / 32 + 0.6 * 24 / 32 + 0.4 * 16 / 28) / 2)
    assert found.hausdorff == pytest.approx((8 + 0.6 * 8 + 0.4 * 12) / 2)


def test_covered_is_of_the_annotated_gland_and_not_iou() -> None:
    found = scores(strip((1, 0, 4)), strip((1, 0, 40)))
    assert (found.true_positives, found.false_positives) == (1, 0)  # covered wholly, though its IoU is .1


def test_an_object_that_overlaps_with_none_takes_the_nearest() -> None:
    annotated, predicted = strip((1, 0, 4), (2, 20, 24)), strip((1, 0, 4), (2, 27, 31))
    found = scores(annotated, predicted)
    assert (found.true_positives, found.false_positives, found.false_negatives) == (1, 1, 1)
    assert found.dice == 0.5
    assert found.hausdorff == pytest.approx((0.5 * 7 + 0.5 * 7) / 2)  # 24 to 27 is nearer than 24 to 0


def test_holes_are_background() -> None:
    """A ring against the full square: what is in the hole counts as missed, and 2 pixels lie between."""
    full = np.zeros((9, 9), np.int64)
    full[1:8, 1:8] = 1
    ring = full.copy()
    ring[3:6, 3:6] = 0
    found = scores(full, ring)
    assert found.true_positives == 1
    assert found.dice == pytest.approx(2 * 40 / (40 + 49))
    assert found.hausdorff == 2  # from the hole's centre; along the outlines it would be 0
    inner = np.zeros_like(full)
    inner[3:6, 3:6] = 1
    assert scores(ring, inner).dice == 0 and scores(ring, inner).hausdorff == pytest.approx(math.hypot(2, 2))


def test_weights_run_over_the_whole_set() -> None:
    good, bad = strip((1, 0, 30)), strip((1, 0, 10))
    found = glas_scores([(good, good), (bad, strip((1, 20, 30)))])
    assert found.dice == pytest.approx(0.75)  # 300 pixels of 400, and not the images' mean of .5
    assert found.hausdorff == pytest.approx(0.25 * 20)
    assert found.f1 == 0.5


def test_an_empty_image_is_in_the_set() -> None:
    one = strip((1, 0, 10))
    found = glas_scores([(one, one), (strip(), strip()), (one, strip())])
    assert found.recall == 0.5 and found.precision == 1
    assert found.dice == pytest.approx((1 + 0.5) / 2)
    assert found.hausdorff == pytest.approx((0 + 0.5 * math.hypot(39, 9)) / 2)


def by_definition(pairs: list[tuple[Mask, Mask]]) -> tuple[int, float, float]:
    """True positives, object-level Dice and Hausdorff distance, word for word as the paper has them."""
    positives, sums = 0, {"dice": [0.0, 0.0], "hausdorff": [0.0, 0.0]}
    totals = [sum(int((pair[1 - side] > 0).sum()) for pair in pairs) for side in (0, 1)]
    for annotated, predicted in pairs:
        for side, (own, other) in enumerate(((predicted, annotated), (annotated, predicted))):
            partners = [other == number for number in np.unique(other) if number]
            for number in np.unique(own)[1:]:
                one = own == number
                overlaps = [int((one & partner).sum()) for partner in partners]
                weight = one.sum() / totals[side]
                if max(overlaps):
                    partner = partners[overlaps.index(max(overlaps))]
                    sums["dice"][side] += weight * 2 * max(overlaps) / (one.sum() + partner.sum())
                    sums["hausdorff"][side] += weight * slow_hausdorff(one, partner)
                    positives += side == 0 and max(overlaps) / partner.sum() > 0.5
                else:
                    sums["hausdorff"][side] += weight * min(slow_hausdorff(one, partner) for partner in partners)
    return positives, sum(sums["dice"]) / 2, sum(sums["hausdorff"]) / 2


def slow_hausdorff(one: Mask, other: Mask) -> float:
    """Every pixel of one with every pixel of the other."""
    a, b = np.argwhere(one), np.argwhere(other)
    squares = ((a[:, None] - b[None]) ** 2).sum(2)
    return math.sqrt(max(squares.min(0).max(), squares.min(1).max()))


def disturbed(mask: Mask, seed: int) -> Mask:
    """A prediction with everything that goes wrong: moved, split, merged, missed, invented, holed."""
    rng = np.random.default_rng(seed)
    moved = np.roll(mask, rng.integers(-4, 5, 2), (0, 1)).astype(np.int64)
    numbers = np.unique(moved)[1:]
    height, width = mask.shape
    half = np.zeros_like(moved)
    half[:, : width // 2] = 1000
    moved = np.where(np.isin(moved, numbers[::3]), moved + half, moved)
    moved[moved == numbers[1]] = numbers[-1]
    moved[np.isin(moved, numbers[4::5])] = 0
    for invented in range(3):
        disc(moved, 5000 + invented, rng.integers(height), rng.integers(width), 4)
    disc(moved, 0, rng.integers(height), rng.integers(width), 6)
    return moved


def test_the_scores_are_the_papers_on_glands_that_were_spoilt() -> None:
    pairs = []
    for seed in range(4):
        _, annotated = draw_glands(seed, 72, 90)
        pairs.append((annotated, disturbed(annotated, seed)))
    positives, dice, distance = by_definition(pairs)
    found = glas_scores(pairs)
    assert found.true_positives == positives and found.false_positives > 0 and found.false_negatives > 0
    assert found.dice == pytest.approx(dice, abs=1e-12) and 0 < dice < 1
    assert found.hausdorff == pytest.approx(distance, abs=1e-9) and distance > 0
    # image by image, as a job of several processes would
    assert pooled(compare(*pair) for pair in pairs) == found


def test_the_numbers_of_objects_mean_nothing() -> None:
    _, annotated = draw_glands(9, 72, 90)
    predicted = disturbed(annotated, 9)
    renumbered = np.where(predicted > 0, predicted * 7 + 3, 0).astype(np.uint16)
    assert scores(annotated, predicted) == scores(annotated.astype(np.int32) * 11, renumbered)


@pytest.mark.parametrize(
    ("annotated", "predicted", "message"),
    [
        (strip(), strip(width=39), "give two"),
        (strip()[None], strip()[None], "give two"),
        (strip(), strip() / 2, "the predicted mask is float64"),
        (strip() - 1, strip(), "the annotated mask is int64 or negative"),
    ],
)
def test_masks_that_are_none(annotated: Mask, predicted: Mask, message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(annotated, predicted)
