"""The crop recipe, and what holds for the views of every recipe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.models.preprocess import preprocess, to_planes
from ca2cl.views.build import Views, build_views
from ca2cl.views.crop import CropRecipe
from ca2cl.views.ops.random import Draws


def _tiles(count: int, side: int = 72) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1)
    tiles = (smooth * 255).byte().permute(0, 2, 3, 1).contiguous()
    return tiles, torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator)


def _views(size: int = 32, recipe: str = "crop") -> Views:
    config = ViewsConfig(recipe=recipe)  # type: ignore[arg-type]
    return build_views(config, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=7)


RECIPES = ["crop", "ca2cl"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("side", "size"), [(72, 33), (70, 32), (40, 64), (48, 48)])
def test_views_do_not_depend_on_the_batch(recipe: str, side: int, size: int) -> None:
    tiles, keys = _tiles(21, side)
    views = _views(size, recipe)
    strong, weak = views(tiles, keys, 2)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    shuffled_strong, shuffled_weak = views(tiles[order], keys[order], 2)
    assert torch.equal(shuffled_strong, strong[order]) and torch.equal(shuffled_weak, weak[order])
    for row in range(21):
        alone_strong, alone_weak = views(tiles[row : row + 1], keys[row : row + 1], 2)
        assert torch.equal(alone_strong[0], strong[row]) and torch.equal(alone_weak[0], weak[row])


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_have_the_form_that_the_encoder_takes(recipe: str) -> None:
    tiles, keys = _tiles(5)
    for view in _views(40, recipe)(tiles, keys, 0):
        assert view.shape == (5, 3, 40, 40) and view.dtype == torch.float32
        assert view.is_contiguous(memory_format=torch.channels_last) and torch.isfinite(view).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_raw_views_are_the_views_before_normalisation(recipe: str) -> None:
    tiles, keys = _tiles(5)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    for raw, view in zip(_views(40, recipe).raw(tiles, keys, 0), _views(40, recipe)(tiles, keys, 0), strict=True):
        assert raw.min() >= 0 and raw.max() <= 1
        torch.testing.assert_close((raw - mean) / std, view, atol=1e-5, rtol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_epochs_views_and_seeds_differ(recipe: str) -> None:
    tiles, keys = _tiles(4)
    tiles = tiles[:1].expand(4, -1, -1, -1)
    strong, weak = _views(40, recipe)(tiles, keys, 0)
    again, _ = _views(40, recipe)(tiles, keys, 1)
    assert (strong != weak).any() and (strong != again).any() and (strong[0] != strong[1]).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tiles_are_left_as_they_were(recipe: str) -> None:
    tiles, keys = _tiles(3)
    before = tiles.clone()
    _views(72, recipe)(tiles, keys, 0)
    assert torch.equal(tiles, before)


def test_bad_batches_are_refused() -> None:
    tiles, keys = _tiles(3)
    with pytest.raises(ValueError, match="key hashes"):
        _views()(tiles, keys[:2], 0)
    with pytest.raises(ValueError, match="uint8"):
        _views()(tiles.float(), keys, 0)


def test_a_whole_crop_without_jitter_is_the_tile_up_to_flips_turns_and_blur() -> None:
    tiles, keys = _tiles(40, 64)
    recipe = CropRecipe(64, scale=(1.0, 1.0), strength=0.0)
    draws = Draws(keys, seed=0, epoch=0, view="strong")
    # Area 1 and ratio r cover min(1, √r) by min(1, 1/√r): only samples that are neither grey nor blurred are compared.
    out = recipe.strong(to_planes(tiles), draws)
    plain = ~(draws.chance("grey", 0.2) | draws.chance("blur", 0.5))
    assert plain.any()
    ratio = torch.exp(draws.uniform("crop.ratio", float(np.log(0.75)), float(np.log(4 / 3))))
    share = torch.minimum(ratio, 1 / ratio).sqrt()
    for row in torch.nonzero(plain).flatten().tolist():
        # The window's mean colour is near the tile's, as it covers at least 86 % of it.
        assert share[row] > 0.86
        difference = (out[row].mean((1, 2)) - to_planes(tiles[row : row + 1])[0].mean((1, 2))).abs()
        assert difference.max() < 0.06


def test_preprocess_matches_an_antialiased_resize_and_normalisation() -> None:
    tiles, _ = _tiles(3, 72)
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
    tiles, _ = _tiles(2, 32)
    out = preprocess(tiles, 32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    torch.testing.assert_close(out, tiles.permute(0, 3, 1, 2).float() / 255, atol=1e-6, rtol=0)
