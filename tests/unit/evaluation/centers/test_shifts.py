"""Shifted tiles: against slow loops, and scored."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.evaluation.centers.indices import indices
from ca2cl.evaluation.centers.shift_scores import shift_scores
from ca2cl.evaluation.centers.shifts import FAMILIES, SHIFTS, STAINS, Shift, blur, jpeg, scanner, stain
from ca2cl.evaluation.features import Features, colour_histogram
from ca2cl.evaluation.linear_head import LinearHead
from ca2cl.evaluation.statistics import Units


def tissue(side: int = 24, count: int = 2, seed: int = 0) -> torch.Tensor:
    """Pink and violet blobs."""
    generator = np.random.default_rng(seed)
    amount = generator.random((count, side // 4, side // 4, 2)).repeat(4, axis=1).repeat(4, axis=2)
    density = amount @ STAINS[:2] + 0.02 * generator.random((count, side, side, 3))
    return torch.from_numpy((255 * np.exp(-density)).round().astype(np.uint8))


def test_stains_are_unmixed_changed_and_mixed_again_pixel_by_pixel() -> None:
    tiles = tissue()
    found = stain(1.3, 0.7)(tiles)
    for place in ((0, 0, 0), (0, 11, 5), (1, 23, 23), (1, 8, 2)):
        density = np.array([-math.log(max(int(v), 1) / 255) for v in tiles[place]])
        amounts = np.linalg.solve(STAINS.T, density) * (1.3, 0.7, 1.0)
        expected = [min(255, max(0, 255 * math.exp(-float(d)))) for d in STAINS.T @ amounts]
        assert found[place].tolist() == pytest.approx(expected, abs=0.51)
    assert (stain(1.0, 1.0)(tiles).int() - tiles.int()).abs().max() <= 1
    white = torch.full((1, 4, 4, 3), 255, dtype=torch.uint8)
    assert torch.equal(stain(1.4, 0.6)(white), white), "glass takes no stain"


def test_a_scanner_is_a_curve_for_each_channel() -> None:
    tiles = tissue()
    found = scanner(1.3, 1.0, 0.9)(tiles)
    for channel, gain in enumerate((1.0, 1.0, 0.9)):
        expected = np.round(255 * gain * (tiles[..., channel].numpy() / 255) ** 1.3)
        assert np.array_equal(found[..., channel].numpy(), expected)


def test_jpeg_is_that_of_another_encoder() -> None:
    tiles = tissue(48)
    found = jpeg(50)(tiles)
    buffer = io.BytesIO()
    Image.fromarray(tiles[0].numpy()).save(buffer, "JPEG", quality=50, subsampling="4:2:0")
    other = np.asarray(Image.open(buffer)).astype(int)
    ours, before = found[0].numpy().astype(int), tiles[0].numpy().astype(int)
    assert np.abs(ours - other).mean() < np.abs(ours - before).mean() / 2


def test_a_blur_is_a_gaussian_mean_of_the_neighbourhood() -> None:
    tiles = tissue()
    found = blur(1.0)(tiles)
    taps = [math.exp(-0.5 * n * n) for n in range(-3, 4)]
    around = tiles[1, 7:14, 9:16, 2].numpy().astype(float)
    expected = sum(
        a * b * around[y, x] for y, a in enumerate(taps) for x, b in enumerate(taps)
    ) / sum(taps) ** 2  # fmt: skip
    assert int(found[1, 10, 12, 2]) == pytest.approx(expected, abs=0.51)


@pytest.mark.parametrize("family", FAMILIES)
def test_strengths_rise_and_pixels_are_the_same_each_time(family: str) -> None:
    tiles = tissue(48)
    moved = []
    for shift in (shift for shift in SHIFTS if shift.family == family):
        found = shift.apply(tiles)
        assert found.dtype == torch.uint8 and found.shape == tiles.shape and torch.equal(found, shift.apply(tiles))
        assert torch.equal(shift.apply(tiles[1:]), found[1:]), "a tile's shift does not depend on the batch"
        moved.append(float((found.float() - tiles.float()).abs().mean()))
    assert len(moved) == 3 and 0.3 < moved[0] < moved[1] < moved[2] < 60


def test_shifted_tiles_are_scored_by_the_classifier_of_the_clean_ones() -> None:
    """Features are the mean colour; the classifier calls a tile bright above 128, so darkening by 100 turns the
    brighter class into errors."""
    level = np.array([60, 60, 160, 160, 250, 250])
    labels = (level > 128).astype(np.int64)
    tiles = torch.from_numpy(np.broadcast_to(level[:, None, None, None], (6, 8, 8, 3)).astype(np.uint8).copy())

    def mean(batch: torch.Tensor) -> torch.Tensor:
        return batch.float().mean(dim=(1, 2))

    head = LinearHead(np.array([[0.0] * 3, [1.0, 0, 0]]), np.array([128.0, 0]))
    darker = (Shift("dark", 1, "", lambda t: (t.int() - 100).clamp(min=0).to(torch.uint8)),)
    clean = Features({"encoder": mean(tiles).numpy()}, labels, np.arange(6), [b""] * 6)
    batches = [(tiles[s], torch.from_numpy(labels[s]), torch.arange(6)[s]) for s in (slice(0, 4), slice(4, 6))]
    first, second = shift_scores(
        batches, {"encoder": mean}, {"encoder": head}, clean, Units.of(None, 6), device=torch.device("cpu"), title="t",
        shifts=darker,
    )  # fmt: skip
    assert (first.family, first.accuracy, first.drop) == ("clean", 1.0, 0.0)
    assert (second.family, second.strength) == ("dark", 1)
    assert second.accuracy == pytest.approx(4 / 6) and second.drop == pytest.approx(2 / 6)
    assert second.drop_interval_95[0] < second.drop < second.drop_interval_95[1]


def test_a_stain_shift_of_half_the_tiles_lowers_the_indices_step_by_step() -> None:
    """Two made-up centres, whose tiles differ in nothing but the shift of the second; classes differ in texture."""
    generator = np.random.default_rng(0)
    labels, centers = np.arange(240) % 3, np.arange(240) // 3 % 2
    tiles = torch.cat([tissue(16, 1, seed) for seed in range(240)])
    dots = torch.from_numpy(generator.random((240, 16, 16, 1)) < 0.12 * labels[:, None, None, None])
    tiles = torch.where(dots, torch.tensor([90, 50, 120], dtype=torch.uint8), tiles)
    second = torch.from_numpy(centers == 1)[:, None, None, None]
    found = []
    for strength in (0.0, 0.1, 0.2, 0.4):
        mixed = torch.where(second, stain(1 + strength, 1 - strength)(tiles), tiles)
        found.append(indices(colour_histogram(mixed).numpy(), labels, centers, np.arange(240)))
    for name in ("ri", "mari", "croma"):
        values = [getattr(one, name) for one in found]
        assert values == sorted(values, reverse=True) and len(set(values)) == 4, (name, values)
    assert found[0].croma > 0 > found[-1].croma
