"""Affine maps against what they say of points."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ca2cl.views.draw import maps


def _through(numbers: Any, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = numbers
    return a * x + b * y + c, d * x + e * y + f


@pytest.mark.parametrize("code", range(8))
def test_dihedral_maps_are_exact_transposes_and_flips(code: int) -> None:
    flags = bool(code & 1), bool(code & 2), bool(code & 4)
    image = np.arange(16).reshape(4, 4)
    flipped = image.T if flags[0] else image
    flipped = flipped[::-1] if flags[1] else flipped
    flipped = flipped[:, ::-1] if flags[2] else flipped
    numbers = maps.dihedral(*(np.array(flag) for flag in flags))
    for i, j in np.ndindex(4, 4):
        x, y = _through(numbers, (j - 1.5) / 2, (i - 1.5) / 2)
        assert image[round(y * 2 + 1.5), round(x * 2 + 1.5)] == flipped[i, j]


def test_maps_compose_and_invert() -> None:
    first, second = np.random.default_rng(0).normal(size=(2, 5, 6))
    for one, two, both, back in zip(first, second, maps.then(first, second), maps.inverse(first, 0.0), strict=True):
        np.testing.assert_allclose(_through(both, 0.3, 0.2), _through(two, *_through(one, 0.3, 0.2)))
        np.testing.assert_allclose(_through(back, *_through(one, 0.3, 0.2)), (0.3, 0.2))
    flat = maps.inverse(maps.affine(1.0, 1.0, 0.0, 1.0, 1.0, 0.0), 0.01)
    np.testing.assert_allclose(flat, [100, -100, 0, -100, 100, 0])


def test_shift_scale_rotate_reads_where_a_point_came_from() -> None:
    numbers = maps.shift_scale_rotate(*map(np.array, (0.1, -0.2, 1.2, 30.0)))
    x, y = 0.4, -0.3  # of a tile; turned counter-clockwise (y is down), scaled, shifted by shares of the side of 2
    cos, sin = math.cos(math.radians(30)), math.sin(math.radians(30))
    there = 1.2 * (cos * x + sin * y) + 0.2, 1.2 * (-sin * x + cos * y) - 0.4
    np.testing.assert_allclose(_through(numbers, *there), (x, y), atol=1e-12)


def test_a_window_fills_the_view() -> None:
    numbers = maps.window(*map(np.array, (0.25, 0.1, 0.5, 0.6)))
    np.testing.assert_allclose(_through(numbers, -1, -1), (-0.5, -0.8), atol=1e-12)
    np.testing.assert_allclose(_through(numbers, 1, 1), (0.5, 0.4), atol=1e-12)


def test_three_points_move_by_what_is_given() -> None:
    moves, s = np.random.default_rng(1).normal(size=(3, 2)), 2 / 3
    numbers = maps.three_points(moves)
    for (x, y), (dx, dy) in zip([(s, s), (s, -s), (-s, -s)], moves, strict=True):
        np.testing.assert_allclose(_through(numbers, x, y), (x + dx, y + dy))
