"""Geometry of the views against slow loops over pixels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.views.ops import distort, geometry
from ca2cl.views.ops.random import Draws

_KEYS = torch.arange(400, dtype=torch.int64)


def _image(side: int = 12, count: int = 1) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5))


def _pixel(image: np.ndarray, y: int, x: int, border: str) -> np.ndarray:
    height, width = image.shape[1:]
    if border == "zero" and not (0 <= y < height and 0 <= x < width):
        return np.zeros(3)
    while not 0 <= y < height:
        y = -1 - y if y < 0 else 2 * height - 1 - y
    while not 0 <= x < width:
        x = -1 - x if x < 0 else 2 * width - 1 - x
    return image[:, y, x]


def _read(image: np.ndarray, y: float, x: float, border: str) -> np.ndarray:
    """Bilinear reading at a pixel position."""
    top, left = math.floor(y), math.floor(x)
    down, right = y - top, x - left
    return (
        (1 - down) * (1 - right) * _pixel(image, top, left, border)
        + (1 - down) * right * _pixel(image, top, left + 1, border)
        + down * (1 - right) * _pixel(image, top + 1, left, border)
        + down * right * _pixel(image, top + 1, left + 1, border)
    )


def _flags(*values: bool) -> list[torch.Tensor]:
    return [torch.tensor([value]) for value in values]


def _numbers(*values: float) -> list[torch.Tensor]:
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@pytest.mark.parametrize("code", range(8))
def test_dihedral_maps_are_exact_transposes_and_flips(code: int) -> None:
    image = _image()
    transpose, vertical, horizontal = bool(code & 1), bool(code & 2), bool(code & 4)
    affine = geometry.dihedral(*_flags(transpose, vertical, horizontal))
    out = geometry.sample(image, *geometry.affine_grid(affine, 12, image.device))
    expected = image.transpose(2, 3) if transpose else image
    expected = expected.flip(2) if vertical else expected
    expected = expected.flip(3) if horizontal else expected
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 7), st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(0.7, 1.3), st.floats(-60, 60))
def test_composed_shift_scale_rotate_and_flips_match_a_loop(
    code: int, shift_x: float, shift_y: float, scale: float, degrees: float
) -> None:
    side, image = 10, _image(10)
    flags = bool(code & 1), bool(code & 2), bool(code & 4)
    turn = geometry.shift_scale_rotate(*_numbers(shift_x, shift_y, scale, degrees))
    x, y = geometry.affine_grid(turn.then(geometry.dihedral(*_flags(*flags))), side, image.device)
    out = (geometry.sample(image, x, y) * geometry.coverage(x, y, side)[:, None])[0].numpy()
    flipped = image[0].transpose(1, 2) if flags[0] else image[0]
    flipped = flipped.flip(1) if flags[1] else flipped
    flipped = (flipped.flip(2) if flags[2] else flipped).numpy()
    cos, sin, centre = math.cos(math.radians(degrees)), math.sin(math.radians(degrees)), (side - 1) / 2
    for row in range(side):
        for column in range(side):
            right, up = column - centre - shift_x * side, -(row - centre - shift_y * side)
            # A point turned counter-clockwise came from where a clockwise turn takes it.
            from_x, from_y = (right * cos + up * sin) / scale, -(-right * sin + up * cos) / scale
            expected = _read(flipped, from_y + centre, from_x + centre, "zero")
            np.testing.assert_allclose(out[:, row, column], expected, atol=2e-4)


def test_a_reflected_reading_times_its_coverage_is_a_reading_with_zeros_around() -> None:
    image, generator = _image(9, 2), torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 30, 30, generator=generator) * 3 - 1.5 for _ in range(2))
    zeros = F.grid_sample(image, torch.stack((x, y), -1), padding_mode="zeros", align_corners=False)
    mine = geometry.sample(image, x, y) * geometry.coverage(x, y, 9)[:, None]
    torch.testing.assert_close(mine, zeros, atol=1e-5, rtol=0)


def test_crop_covers_its_window() -> None:
    image = _image(20)
    affine = geometry.crop(*_numbers(0.25, 0.1, 0.5, 0.5))
    out = geometry.sample(image, *geometry.affine_grid(affine, 10, image.device))
    torch.testing.assert_close(out, image[:, :, 2:12, 5:15], atol=1e-5, rtol=0)


def test_maps_compose_in_the_order_of_then() -> None:
    numbers = torch.rand(12, 3, dtype=torch.float64)
    first, second = geometry.Affine(*numbers[:6]), geometry.Affine(*numbers[6:])
    x = y = torch.full((3, 1, 1), 0.3)
    expected = geometry.move(*geometry.move(x, y, first), second)
    torch.testing.assert_close(geometry.move(x, y, first.then(second)), expected)


@pytest.mark.parametrize(("side", "factor"), [(12, 3), (14, 4), (12, 1)])
def test_reduction_is_the_mean_over_blocks(side: int, factor: int) -> None:
    image = _image(side)
    out = geometry.reduce_by(image, factor)
    assert out.shape[-1] == round(side / factor)
    torch.testing.assert_close(out.mean((2, 3)), image.mean((2, 3)), atol=0.03, rtol=0)
    if side % factor == 0:
        expected = image.unfold(2, factor, factor).unfold(3, factor, factor).mean((-1, -2))
        torch.testing.assert_close(out, expected)


def test_a_fine_pattern_does_not_alias() -> None:
    stripes = torch.zeros(1, 3, 224, 224)
    stripes[..., ::2] = 1.0
    x, y = geometry.affine_grid(geometry.Affine.identity(torch.ones(1, dtype=torch.float64)), 50, stripes.device)
    factor = int(geometry.reduction(torch.tensor([224.0]), 50))
    assert factor == 4
    assert (geometry.sample_reduced(stripes, [factor], x, y) - 0.5).abs().max() < 1e-5
    assert (geometry.sample(stripes, x, y) - 0.5).abs().max() > 0.2


def test_each_tile_is_reduced_by_its_own_factor() -> None:
    images = _image(24, 4)
    x, y = geometry.affine_grid(geometry.Affine.identity(torch.ones(4, dtype=torch.float64)), 8, images.device)
    out = geometry.sample_reduced(images, [1, 3, 2, 3], x, y)
    for row, factor in enumerate([1, 3, 2, 3]):
        alone = geometry.sample(geometry.reduce_by(images[row : row + 1], factor), x[:1], y[:1])
        torch.testing.assert_close(out[row : row + 1], alone)


def _points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.rand(3, 4, 4, generator=generator) * 2 - 1 for _ in range(2))  # type: ignore[return-value]


def test_optical_distortion_moves_points_along_their_radius() -> None:
    (x, y), ks = _points(), [-1.0, 0.0, 0.7]
    out_x, out_y = distort.optical(x, y, torch.tensor(ks, dtype=torch.float64))
    for place in np.ndindex(3, 4, 4):
        px, py = float(x[place]) / 2, float(y[place]) / 2  # in sides of the image
        r = math.hypot(px, py)
        factor = 1 + ks[place[0]] * r**2 + ks[place[0]] * r**4
        assert out_x[place] == pytest.approx(2 * px * factor, abs=1e-5)
        assert out_y[place] == pytest.approx(2 * py * factor, abs=1e-5)


def test_grid_distortion_stretches_cells_one_after_another() -> None:
    x, y = _points()
    steps_x, steps_y = (
        torch.rand(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) * 2 for s in (1, 2)
    )
    for out, at, steps in zip(distort.grid(x, y, steps_x, steps_y), (x, y), (steps_x, steps_y), strict=True):
        for place in np.ndindex(3, 4, 4):
            ends = np.concatenate([[0], np.cumsum(steps[place[0]].numpy() / 5)])
            expected = np.interp((float(at[place]) + 1) / 2, np.arange(6) / 5, ends)
            assert (float(out[place]) + 1) / 2 == pytest.approx(expected, abs=1e-5)
    same_x, _ = distort.grid(x, y, torch.ones(3, 5), torch.ones(3, 5))
    torch.testing.assert_close(same_x, x, atol=1e-6, rtol=0)


def test_three_points_move_where_they_are_told() -> None:
    moves = torch.rand(4, 3, 2, dtype=torch.float64) - 0.5
    affine, s = distort.three_points(moves), 2.0 / 3.0
    for i, (x, y) in enumerate([(s, s), (s, -s), (-s, -s)]):
        torch.testing.assert_close(affine.a * x + affine.b * y + affine.c, x + moves[:, i, 0])
        torch.testing.assert_close(affine.d * x + affine.e * y + affine.f, y + moves[:, i, 1])


def test_the_smooth_field_is_smooth_noise() -> None:
    _, waves, phases = distort.draw_elastic(Draws(_KEYS, seed=0, epoch=0, view="strong"))
    x, y = geometry.affine_grid(geometry.Affine.identity(torch.ones(400, dtype=torch.float64)), 15, _KEYS.device)
    field = distort.smooth_field(x, y, waves[:, 0], phases[:, 0])
    assert abs(field.mean()) < 0.1 and abs(field.var() - 1) < 0.1
    # Correlation exp(-d² / 4σ²) of white noise after a Gaussian filter; neighbours at 7 pixels of 15 are 14/15 apart.
    sigma, distance = 2 * distort.ELASTIC_SIGMA, 14 / 15
    measured = (field[:, :, 0] * field[:, :, 7]).mean()
    assert abs(measured - math.exp(-(distance**2) / (4 * sigma**2))) < 0.08


def test_elastic_is_its_affine_part_plus_a_hundredth_of_a_pixel() -> None:
    draws = Draws(_KEYS, seed=0, epoch=0, view="strong")
    moves, waves, phases = distort.draw_elastic(draws)
    assert moves.abs().max() <= 100 / 224 and moves.abs().max() > 95 / 224
    x, y = geometry.affine_grid(geometry.Affine.identity(torch.ones(400, dtype=torch.float64)), 8, _KEYS.device)
    out_x, out_y = distort.elastic(x, y, moves, waves, phases)
    plain_x, plain_y = geometry.move(x, y, distort.three_points(moves))
    pixels = torch.cat((out_x - plain_x, out_y - plain_y)) * 112
    # α / (√3 · 2 √π σ) with α = 3 and σ = 50.
    assert float(pixels.std()) == pytest.approx(3 / math.sqrt(3) / (2 * math.sqrt(math.pi) * 50), rel=0.1)
