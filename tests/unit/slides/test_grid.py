"""Area averaging and the grid of tiles, against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.slides.area import area_mean
from ca2cl.slides.grid import choose_level, make_grid
from ca2cl.slides.readers.base import Level, SlideError


def slow_mean(pixels, left, top, scale, width, height):
    """The mean over every box, pixel by pixel."""
    out = np.zeros((height, width, pixels.shape[2]))
    for i in range(height):
        for j in range(width):
            y0, y1, x0, x1 = top + i * scale, top + (i + 1) * scale, left + j * scale, left + (j + 1) * scale
            for y in range(pixels.shape[0]):
                for x in range(pixels.shape[1]):
                    part = max(min(y1, y + 1) - max(y0, y), 0) * max(min(x1, x + 1) - max(x0, x), 0)
                    out[i, j] += part * pixels[y, x]
    return out / scale**2


@settings(max_examples=60, deadline=None)
@given(
    scale=st.floats(0.96, 4.0), left=st.floats(0, 2), top=st.floats(0, 2), width=st.integers(1, 4),
    height=st.integers(1, 4), seed=st.integers(0, 99),
)  # fmt: skip
def test_area_mean_is_the_mean_over_each_box(scale, left, top, width, height, seed):
    shape = (math.ceil(top + height * scale), math.ceil(left + width * scale), 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    expected = slow_mean(pixels, left, top, scale, width, height)
    assert np.abs(area_mean(pixels, left, top, scale, width, height) - expected).max() <= 0.5 + 1e-3  # float32


def test_area_mean_at_scale_one_is_the_input():
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    assert (area_mean(pixels, 2, 1, 1.0, 4, 5) == pixels[1:6, 2:6]).all()


def pyramid(width, height, *downsamples):
    return [Level(round(width / one), round(height / one), one) for one in downsamples]


@pytest.mark.parametrize(
    ("mpp", "level", "scale"),
    [
        (0.25, 0, 1.0),
        (0.5, 0, 2.0),
        (0.99, 0, 3.96),
        (1.0, 1, 1.0),
        (2.0, 1, 2.0),
        (4.0, 2, 1.0),
        (9.0, 2, 2.25),
        (0.24, 0, 0.96),
    ],
)
def test_the_coarsest_level_that_is_fine_enough_is_read(mpp, level, scale):
    found = choose_level(pyramid(4000, 4000, 1, 4, 16), 0.25, mpp)
    assert found == (level, pytest.approx(scale))


def test_a_coarser_slide_is_refused():
    with pytest.raises(
        SlideError, match=r"0.5 micrometres a pixel are coarser than --mpp 0.25; give --mpp 0.5 or more"
    ):
        choose_level(pyramid(4000, 4000, 1), 0.5, 0.25)


@settings(max_examples=100, deadline=None)
@given(
    width=st.integers(300, 5000), height=st.integers(300, 5000), scale=st.floats(1, 5), tile=st.integers(16, 200),
    overlap=st.integers(0, 15), pad=st.booleans(),
)  # fmt: skip
def test_tiles_cover_the_slide_without_gap(width, height, scale, tile, overlap, pad):
    slide_mpp = 0.25
    try:
        grid = make_grid(pyramid(width, height, 1), slide_mpp, slide_mpp * scale, tile=tile, overlap=overlap, pad=pad)
    except SlideError:
        assert not pad and min(width, height) < tile * scale + 1e-3
        return
    boxes = grid.boxes(grid.corners())
    side = tile * scale
    assert np.allclose(boxes[:, 2:] - boxes[:, :2], side)
    for axis, length in ((0, width), (1, height)):
        starts = np.unique(boxes[:, axis].round(6))
        assert starts[0] == 0
        assert np.allclose(np.diff(starts), (tile - overlap) * scale)
        last = boxes[:, axis + 2].max()
        if pad:  # all of the slide, and no tile without any of it
            assert last >= length - 1e-3
            assert starts[-1] + overlap * scale < length or len(starts) == 1
        else:  # inside, and no room for another one
            assert last <= length + 1e-3
            assert last + (tile - overlap) * scale > length - 1e-3


def test_squares_are_cut_one_after_another():
    grid = make_grid(pyramid(40 * 16, 40 * 16, 1), 0.25, 0.25, tile=16, overlap=0, pad=False)
    numbers = np.flatnonzero(np.random.default_rng(0).random(len(grid)) < 0.5)
    found = grid.by_squares(numbers)
    assert sorted(found.tolist()) == numbers.tolist()
    squares = [tuple(corner) for corner in (grid.corners(found)[:, ::-1] // 16).tolist()]
    assert squares == sorted(squares)
    assert len(set(squares)) == 9
