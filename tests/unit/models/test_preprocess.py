"""Tiles as a frozen encoder takes them."""

from __future__ import annotations

import torch

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.models.preprocess import preprocess


def _tiles(count: int, side: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def test_preprocess_matches_an_antialiased_resize_and_normalisation() -> None:
    tiles = _tiles(3, 72)
    out = preprocess(tiles, 24, IMAGENET_MEAN, IMAGENET_STD)
    assert out.shape == (3, 3, 24, 24) and out.is_contiguous(memory_format=torch.channels_last)
    # A triangle filter of half-width 3, at a reduction by 3.
    weights = torch.zeros(24, 72)
    for i in range(24):
        for j in range(72):
            weights[i, j] = max(0.0, 1 - abs((j + 0.5) - (i + 0.5) * 3) / 3)
    weights = weights / weights.sum(1, keepdim=True)
    image = tiles.permute(0, 3, 1, 2).float() / 255
    expected = torch.einsum("ih,bchw,jw->bcij", weights, image, weights)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close(out, (expected - mean) / std, atol=1e-4, rtol=0)


def test_preprocess_of_a_tile_of_the_right_size_only_normalises() -> None:
    tiles = _tiles(2, 32)
    out = preprocess(tiles, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    torch.testing.assert_close(out, tiles.permute(0, 3, 1, 2).float() / 255, atol=1e-6, rtol=0)
