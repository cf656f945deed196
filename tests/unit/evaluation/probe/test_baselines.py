"""The floors under every table: what they compute."""

from __future__ import annotations

import numpy as np
import torch

from ca2cl.evaluation.features import colour_histogram


def loop_histogram(tile: np.ndarray, bins: int) -> list[float]:
    counts = [[0] * bins for _ in range(3)]
    for row in tile:
        for pixel in row:
            for channel in range(3):
                counts[channel][int(pixel[channel]) * bins // 256] += 1
    return [count / (tile.shape[0] * tile.shape[1]) for channel in counts for count in channel]


def test_the_colour_histogram_equals_counting_pixels_one_by_one() -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 7, 5, 3), dtype=np.uint8)
    found = colour_histogram(torch.from_numpy(tiles))
    assert found.shape == (3, 96) and found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [loop_histogram(tile, 32) for tile in tiles], atol=1e-7)


def test_the_colour_histogram_is_blind_to_where_the_colours_are() -> None:
    tile = torch.arange(48, dtype=torch.uint8).mul(5).view(1, 4, 4, 3)
    moved = tile.flip(1).transpose(1, 2)
    assert torch.equal(colour_histogram(tile), colour_histogram(moved))
    assert torch.equal(colour_histogram(tile).view(1, 3, 32).sum(2), torch.ones(1, 3))


def test_extreme_intensities_fall_in_the_first_and_last_bin() -> None:
    tiles = torch.stack([torch.zeros(2, 2, 3), torch.full((2, 2, 3), 255.0)]).to(torch.uint8)
    found = colour_histogram(tiles).view(2, 3, 32)
    assert (found[0, :, 0] == 1).all() and (found[1, :, 31] == 1).all()
