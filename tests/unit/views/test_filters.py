"""Colour and neighbourhood operations against slow loops from their definitions."""

from __future__ import annotations

import colorsys
import itertools
import math

import numpy as np
import pytest
import torch

from ca2cl.views.ops import clahe, colour, filters, median
from ca2cl.views.ops.hsv import shift_hsv
from ca2cl.views.ops.lookup import ENTRIES, Curve, look_up, table_of
from ca2cl.views.ops.random import Draws


def _images(count: int = 3, side: int = 10) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(11))


def _numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hsv_shift_matches_colorsys() -> None:
    images = _images(4, 6)
    images[0, :, 0] = torch.tensor([0.5, 0.5, 0.5])[:, None]  # grey
    images[0, :, 1] = torch.tensor([1.0, 1.0, 1.0])[:, None]
    images[0, :, 2] = torch.tensor([0.0, 0.0, 0.0])[:, None]
    images[0, :, 3] = torch.tensor([0.7, 0.7, 0.2])[:, None]  # two largest
    shifts = [(0.0, 0.0, 0.0), (10.0, 20.0, -10.0), (-10.0, -20.0, 10.0), (7.0, 255.0, 255.0)]
    out = shift_hsv(images, *(_numbers(*column) for column in zip(*shifts, strict=True)))
    for row, y, x in np.ndindex(4, 6, 6):
        h, s, v = colorsys.rgb_to_hsv(*images[row, :, y, x].double().tolist())
        dh, ds, dv = shifts[row]
        s, v = min(max(s + ds / 255, 0), 1), min(max(v + dv / 255, 0), 1)
        expected = colorsys.hsv_to_rgb((h + dh / 180) % 1.0, s, v)
        np.testing.assert_allclose(out[row, :, y, x].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("kind", ["float", "byte"])
def test_median_matches_a_loop(side: int, kind: str) -> None:
    images = _images(2, 9) if kind == "float" else (_images(2, 9) * 255).byte()
    out = median.median_filter(images, side)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (side // 2,) * 2, (side // 2,) * 2), mode="edge")
    for row, c, y, x in np.ndindex(2, 3, 9, 9):
        assert out[row, c, y, x] == np.median(padded[row, c, y : y + side, x : x + side]).astype(padded.dtype)


@pytest.mark.parametrize("count", [3, 5, 13])
def test_networks_sort_everything(count: int) -> None:
    # A comparator network that sorts all sequences of zeros and ones sorts all sequences (Knuth 5.3.4 Z).
    network = {3: median._SORT_3, 5: median._SORT_5}.get(count, median.merge_sort_network(count))
    for values in itertools.product((0, 1), repeat=count):
        row = list(values)
        for i, j in network:
            row[i], row[j] = min(row[i], row[j]), max(row[i], row[j])
        assert row == sorted(values)


def test_median_blur_is_the_median_of_8_bit_images() -> None:
    images = _images(2, 12)
    expected = median.median_filter((images * 255).round(), 3) / 255
    torch.testing.assert_close(filters.median_blur(images, 3), expected, atol=1e-6, rtol=0)


def test_gaussian_blur_matches_a_loop() -> None:
    images, radius = _images(2, 9), 2
    sigmas, taps = [0.8, 1.1], [1, 2]
    weights = filters.gaussian_weights(_numbers(*sigmas), torch.tensor(taps), radius=radius)
    out = filters.symmetric_blur(images, weights)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for row, c, y, x in np.ndindex(2, 3, 9, 9):
        total = norm = 0.0
        for dy in range(-taps[row], taps[row] + 1):
            for dx in range(-taps[row], taps[row] + 1):
                weight = math.exp(-(dy * dy + dx * dx) / (2 * sigmas[row] ** 2))
                total, norm = total + weight * padded[row, c, y + 2 + dy, x + 2 + dx], norm + weight
        assert out[row, c, y, x] == pytest.approx(total / norm, abs=1e-5)


def test_motion_lines_are_all_the_straight_lines_through_the_centre() -> None:
    lines = filters.motion_lines()
    assert [len(line) for line in lines] == [3] * 4 + [5] * 8
    assert len({frozenset(line) for line in lines}) == 12
    for line in lines:
        assert (0, 0) in line and {(-y, -x) for y, x in line} == set(line)
        for (y0, x0), (y1, x1) in itertools.pairwise(line):
            assert max(abs(y1 - y0), abs(x1 - x0)) == 1


def test_motion_blur_is_the_mean_along_its_line() -> None:
    numbers = [0, 5, 11, 5]
    images = _images(4, 8)
    out = filters.motion_blur(images, torch.tensor(numbers))
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    for row, c, y, x in np.ndindex(4, 3, 8, 8):
        line = filters.motion_lines()[numbers[row]]
        expected = np.mean([padded[row, c, y + 2 + dy, x + 2 + dx] for dy, dx in line])
        assert out[row, c, y, x] == pytest.approx(expected, abs=1e-5)


def test_noise_has_its_variance_and_differs_between_samples() -> None:
    images = torch.full((3, 3, 64, 64), 0.5)
    words = Draws(torch.arange(3), seed=0, epoch=0, view="strong").words("noise")
    noise = (filters.add_noise(images.clone(), _numbers(0.0, 0.01, 0.02), words) - 0.5).flatten(1)
    assert noise[0].abs().max() == 0
    np.testing.assert_allclose(noise.std(1)[1:], [0.01, 0.02], rtol=0.03)
    assert noise.mean(1).abs().max() < 0.001
    assert abs(torch.corrcoef(noise[1:])[0, 1]) < 0.04
    # Channels and neighbours are independent.
    planes = noise[2].view(3, 64, 64) / 0.02
    assert abs((planes[0] * planes[1]).mean()) < 0.07 and abs((planes[:, 1:] * planes[:, :-1]).mean()) < 0.04


def test_the_normal_table_is_normal() -> None:
    table = filters.normal_table(1 << 16, torch.device("cpu")).double()
    assert abs(table.mean()) < 0.02 and abs(table.var() - 1) < 0.03
    assert abs((table**4).mean() - 3) < 0.2 and table.abs().max() < 6


def _slow_lab(rgb: np.ndarray) -> np.ndarray:
    """L in 0 … 100, a, b of one sRGB colour (CIE 1976, D65)."""
    light = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    xyz = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    fx, fy, fz = (
        v ** (1 / 3) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29
        for v in xyz @ np.array(light) / np.array([0.950456, 1.0, 1.088754])
    )
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


def _slow_clahe(levels: np.ndarray, clip: float) -> np.ndarray:
    """CLAHE of one plane of whole numbers, one pixel after another."""
    size = levels.shape[0]
    padded = np.pad(levels, ((0, -size % 8), (0, -size % 8)), mode="reflect")
    cell = padded.shape[0] // 8
    limit = max(1, math.floor(clip * cell * cell / 256))
    tables = np.zeros((8, 8, 256))
    for row, column in np.ndindex(8, 8):
        counts = [0.0] * 256
        for level in padded[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell].ravel():
            counts[int(level)] += 1
        excess = sum(max(0.0, count - limit) for count in counts)
        counts = [min(count, limit) + excess / 256 for count in counts]
        tables[row, column] = np.cumsum(counts) * 255 / cell**2
    out = np.zeros_like(levels, dtype=float)
    for y, x in np.ndindex(size, size):
        at_y, at_x = (y + 0.5) / cell - 0.5, (x + 0.5) / cell - 0.5
        for i in (math.floor(at_y), math.floor(at_y) + 1):
            for j in (math.floor(at_x), math.floor(at_x) + 1):
                weight = (1 - abs(at_y - i)) * (1 - abs(at_x - j))
                out[y, x] += weight * tables[min(max(i, 0), 7), min(max(j, 0), 7), int(levels[y, x])]
    return out


@pytest.mark.parametrize("side", [32, 37])
def test_equalise_matches_a_loop(side: int) -> None:
    generator = torch.Generator().manual_seed(2)
    levels = (torch.randn(2, side, side, generator=generator) * 25 + 130).round().clamp(0, 255)
    out = clahe.equalise(levels.int(), _numbers(1.5, 40.0))
    for row, clip in enumerate((1.5, 40.0)):
        np.testing.assert_allclose(out[row].numpy(), _slow_clahe(levels[row].numpy(), clip), atol=0.02)


def _slow_rgb(lab: np.ndarray) -> np.ndarray:
    """The inverse of ``_slow_lab``."""
    fy = (lab[0] + 16) / 116
    xyz = [
        (f**3 if f > 6 / 29 else 3 * (6 / 29) ** 2 * (f - 4 / 29)) for f in (fy + lab[1] / 500, fy, fy - lab[2] / 200)
    ]
    matrix = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
    light = np.linalg.solve(matrix, np.array(xyz) * np.array([0.950456, 1.0, 1.088754]))
    return np.array([12.92 * c if c <= 0.0031308 else 1.055 * c ** (1 / 2.4) - 0.055 for c in light])


def test_clahe_changes_lightness_and_keeps_a_and_b() -> None:
    # Dull colours in the middle of what RGB can show, their lightness on whole levels: no rounding decides a bin.
    generator = np.random.default_rng(2)
    levels = generator.integers(90, 180, (2, 32, 32))
    lab = np.stack((levels / 2.55, *generator.uniform(-8, 8, (2, 2, 32, 32))), axis=1)
    images = np.apply_along_axis(_slow_rgb, 1, lab)
    assert images.min() > 0 and images.max() < 1
    clips = (2.0, 40.0)
    out = clahe.clahe_lightness(torch.from_numpy(images).float(), _numbers(*clips)).double().numpy()
    shown = ((out > 0.02) & (out < 0.98)).all(1)
    assert shown.mean() > 0.6
    after = np.apply_along_axis(_slow_lab, 1, out)
    for row, clip in enumerate(clips):
        expected = _slow_clahe(levels[row], clip) - levels[row]
        changed = after[row, 0] * 2.55 - levels[row]
        assert np.abs(changed - expected)[shown[row]].max() < 0.4
        assert np.abs(after[row, 1:] - lab[row, 1:])[:, shown[row]].max() < 0.6
        assert np.abs(changed[shown[row]]).max() > 5


def _through(curve: Curve, at: torch.Tensor) -> torch.Tensor:
    return look_up(table_of(curve, at.device), at * ENTRIES)


def test_curves_are_read_to_a_fraction_of_an_8_bit_level() -> None:
    at = torch.linspace(0, 1, 100_001)
    for curve in (clahe.linearise, clahe.delinearise, clahe.to_f):
        assert (_through(curve, at) - curve(at.double())).abs().max() < 0.3 / 255
    assert (_through(clahe.delinearise, _through(clahe.linearise, at)) - at).abs().max() < 0.3 / 255


def test_f_of_lab_has_its_inverse() -> None:
    xyz = torch.linspace(0, 1, 1001, dtype=torch.float64)
    torch.testing.assert_close(clahe.from_f(clahe.to_f(xyz)), xyz)


def test_stain_jitter_is_identity_without_a_change_and_darkens_with_gain() -> None:
    images = _images(2) * 0.9 + 0.1
    one, zero = torch.ones(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    torch.testing.assert_close(colour.stain_jitter(images, one, zero), images, atol=2e-3, rtol=0)
    # A pixel of pure haematoxylin, twice as much of it: its density doubles.
    density = torch.tensor(colour.STAINS[0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    gain = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64)
    out = colour.stain_jitter(torch.exp(-0.5 * density), gain, zero[:1])
    torch.testing.assert_close(out, torch.exp(-density), atol=4e-3, rtol=0)


def test_fused_colour_matches_one_operation_after_another() -> None:
    images = _images(2, 8).double()
    b, c, s, h = 1.2, 0.7, 1.4, 0.06
    luma = torch.tensor(colour.LUMA, dtype=torch.float64).view(1, 3, 1, 1)
    expected = images * b
    expected = expected * c + (1 - c) * (expected * luma).sum(1).mean((1, 2)).view(2, 1, 1, 1)
    grey = (expected * luma).sum(1, keepdim=True)
    expected = expected * s + (1 - s) * grey
    linear = colour.Linear.identity(2, images.device).scaled(_numbers(b, b))
    linear = colour.contrast(linear, _numbers(c, c), images.mean((2, 3)))
    linear = linear.then(colour.saturation_matrix(_numbers(s, s)))
    torch.testing.assert_close(linear(images.float()).double(), expected, atol=1e-5, rtol=0)
    turned = linear.then(colour.hue_matrix(_numbers(h, h)))(images.float()).double()
    # Turning the hue leaves luma and the length of the chroma; a whole turn leaves everything.
    torch.testing.assert_close((turned * luma).sum(1), (expected * luma).sum(1), atol=2e-3, rtol=0)
    assert (turned - expected).abs().max() > 0.02
    whole = linear.then(colour.hue_matrix(_numbers(1.0, 1.0)))(images.float()).double()
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
