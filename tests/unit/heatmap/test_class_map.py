"""Maps of classes against slow loops over places, and what of them is painted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ca2cl.heatmap.class_map import average
from ca2cl.heatmap.picture import Legend, draw_map, paint, palette, scale_bar

RED, BLUE = (255, 0, 0), (0, 0, 255)


def tiles(columns: int, rows: int, side: float, stride: float) -> np.ndarray:
    corners = np.array(list(itertools.product(range(columns), range(rows)))) * stride
    return np.concatenate([corners, corners + side], axis=1)


def loop_mean(boxes: np.ndarray, scores: np.ndarray, x: float, y: float) -> np.ndarray | None:
    """Mean score of the tiles around a place; None where there is none."""
    found = [score for (x0, y0, x1, y1), score in zip(boxes, scores, strict=True) if x0 <= x < x1 and y0 <= y < y1]
    return np.mean(found, axis=0) if found else None


@pytest.mark.parametrize(("side", "stride"), [(10.0, 10.0), (10.0, 5.0), (9.973, 6.1), (10.0, 12.5)])
def test_scores_average_where_tiles_overlap(side: float, stride: float) -> None:
    random = np.random.default_rng(3)
    boxes = tiles(6, 5, side, stride)
    boxes = boxes[random.random(len(boxes)) < 0.7]
    scores = random.dirichlet(np.ones(4), len(boxes))
    found = average(boxes, scores)
    height, width, scale = 60, 70, 1.13
    cells, covered = found.sampled(width, height, scale)
    for y, x in itertools.product(range(0, height, 3), range(0, width, 3)):
        wanted = loop_mean(boxes, scores, (x + 0.5) * scale, (y + 0.5) * scale)
        assert covered[y, x] == (wanted is not None)
        if wanted is not None:
            row, column = cells[y, x]
            np.testing.assert_allclose(found.scores_YXK[row, column], wanted, atol=1e-8)
            assert found.classes_YX[row, column] == wanted.argmax()


def test_shares_are_those_of_the_covered_area() -> None:
    boxes = np.array([[0.0, 0, 10, 10], [5, 0, 15, 10], [40, 40, 50, 50]])
    votes = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    # 0 to 10 is the first's (of equal votes the first class), 10 to 15 the second's
    np.testing.assert_allclose(average(boxes, votes).shares(), [100 / 250, 50 / 250, 100 / 250])


def test_a_place_has_its_classes_colour_and_an_unsure_one_is_paler() -> None:
    boxes = np.array([[0.0, 0, 40, 40], [40, 0, 80, 40]])
    found = average(boxes, np.array([[1.0, 0.0], [0.4, 0.6]]))
    slide = np.full((30, 60, 3), 200, np.uint8)
    painted = paint(slide, found, 2.0, (RED, BLUE), graded=True).astype(int)
    assert (painted[:20, 20:40, 2] > painted[:20, 20:40, 0]).all()
    assert (painted[:20, :20, 0] > painted[:20, :20, 2]).all()
    assert (np.ptp(painted[20:], axis=2) == 0).all() and (np.ptp(painted[:, 40:], axis=2) == 0).all()
    sure, unsure = painted[5, 5], painted[5, 30]
    assert sure[0] - sure[2] > 1.5 * (unsure[2] - unsure[0]) > 0
    flat = paint(slide, found, 2.0, (RED, BLUE), graded=False).astype(int)
    assert flat[5, 5, 0] - flat[5, 5, 2] == flat[5, 30, 2] - flat[5, 30, 0]


@pytest.mark.parametrize(("shape", "beside"), [((300, 200), True), ((200, 500), False)])
def test_slide_and_map_lie_beside_or_below_one_another(shape: tuple[int, int], beside: bool) -> None:
    height, width = shape
    found = average(np.array([[0.0, 0, width, height]]), np.array([[1.0, 0.0]]))
    names = [f"class {'x' * 30} {number}" for number in range(2)]
    legend = Legend("a slide", names, palette(2), [1.0, 0.0], ["a note", "another one"], graded=True)
    picture = draw_map(np.full((*shape, 3), 230, np.uint8), found, 1.0, 2.0, legend)
    assert (picture.width > 2 * width) == beside or not beside
    assert (picture.height > 2 * height) == (not beside)


def test_a_scale_bar_is_a_round_length_of_at_most_a_quarter() -> None:
    assert [scale_bar(width) for width in (100.0, 1110.0, 20_100.0, 79_900.0)] == [20, 200, 5000, 10_000]


@pytest.mark.parametrize("count", [2, 7, 8, 9, 27])
def test_colours_of_a_map_differ(count: int) -> None:
    colours = np.array(palette(count), int)
    apart = [np.abs(one - other).sum() for one, other in itertools.combinations(colours, 2)]
    assert len(colours) == count and min(apart) > 25
