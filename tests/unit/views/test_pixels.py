"""Pixels of the views against slow loops, and what holds for the views of every recipe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views.batch import BOTH, Views
from ca2cl.views.build import build_views
from ca2cl.views.cpu.render import render
from ca2cl.views.draw.table import GAUSSIAN, GRID, MEDIAN, MOTION, NOISE, OPTICAL, Table, plain
from tests.support import views_oracle

RECIPES = ["crop", "ca2cl"]
RAW = np.tile(np.arange(256, dtype=np.uint8), (3, 1))


def tiles_of(count: int, side: int) -> torch.Tensor:
    """Smooth tiles with some grain: colours of all kinds, edges and flat parts."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 9, 9, generator=generator)
    smooth = F.interpolate(coarse, (side, side), mode="bicubic") + 0.03 * torch.randn(
        count, 3, side, side, generator=generator
    )
    return (smooth.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


def keys_of(count: int) -> torch.Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(1))


def views_of(size: int = 32, recipe: str = "crop", **how: Any) -> Views:
    config = ViewsConfig(recipe=recipe)  # type: ignore[arg-type]
    return build_views(config, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=7, **how)


def _render(tiles: torch.Tensor, table: Table, size: int) -> Any:
    out = np.empty((*table.shape, size, size, 3), np.uint8)
    render(tiles.numpy(), table, RAW, out)
    return out


def check_levels(made: Any, expected: Any, clahe: bool = False) -> None:
    """Equal to rounding of 8 bits: a level on the way may be the next one, which later passes make up to three of.

    After CLAHE one more level is nearly a rounding's, where hue is turned of nearly grey pixels.
    """
    apart = np.abs(made.astype(int) - expected.astype(int))
    if clahe:
        assert apart.max() <= 8 and (apart > 1).mean() < 0.02 and apart.mean() < 0.2
    else:
        assert apart.max() <= 3 and (apart > 1).mean() < 2e-3 and (apart > 0).mean() < 0.06


TURNED = {"affine": (0.9, 0.3, 0.2, -0.25, 1.1, -0.1)}
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "flips": {"turn": (0, -1, 0, 1, 0, 0)},
    "affine": TURNED,
    "border": {**TURNED, "border": 1},
    "optical": {**TURNED, "bend": OPTICAL, "optical": -0.8, "turn": (0, 1, 0, -1, 0, 0)},
    "grid": {"bend": GRID, "grid_x": (0.1, 1.9, 1, 0.3, 1.6), "grid_y": (1.2, 0.5, 0.6, 1, 1.5)},
    "elastic": {"turn": (30, -11, 2, 4, 17, -3)},
    "adjust": {"adjust": (1.2, -30, 230)},
    "stain": {"stained": 1, "stain": (1.1, 0.1, -0.05, 0.02, 0.9, 0.1, -0.1, 0.05, 1.2, 0.1, -0.02, 0.03)},
    "colour": {"coloured": 1, "colour": (1.2, -0.1, 0.05, 0.1, 0.8, -0.02, 0.01, 0.2, 0.9, 0.2)},
    "gaussian 3": {"blur": GAUSSIAN, "radius": 1, "sigma": 0.8},
    "gaussian 13": {"blur": GAUSSIAN, "radius": 6, "sigma": 1.7},
    "motion 5": {"blur": MOTION, "line": (-2, 1, 2, -1)},
    "motion 2": {"blur": MOTION, "line": (1, 2, 2, 2)},
    "motion 4": {"blur": MOTION, "line": (2, -1, 0, 2)},
    "median 3": {"blur": MEDIAN, "radius": 1},
    "median 5": {"blur": MEDIAN, "radius": 2},
    "noise": {"blur": NOISE, "deviation": 4.5, "noise": 1234567},
    "hsv": {"shifted": 1, "hsv": (0.3, 0.07, -0.03)},
    "hole": {"hole": (5, 27, 12)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [32, 43])
def test_a_pass_is_what_a_slow_loop_makes(case: str, size: int) -> None:
    tiles, table = tiles_of(2, 32), plain(1, 2)
    for name, value in CASES[case].items():
        table[name] = value
    made = _render(tiles, table, size)
    check_levels(made, np.stack([[views_oracle.view(tile, table[0, 0], size) for tile in tiles.numpy()]]))


@pytest.mark.parametrize("clip", [1, 3])
def test_clahe_is_what_a_slow_loop_makes(clip: int) -> None:
    tiles, table = tiles_of(1, 100), plain(1, 1)
    table["clip"] = clip
    check_levels(_render(tiles, table, 100)[0, 0], views_oracle.view(tiles[0].numpy(), table[0, 0], 100), clahe=True)


@pytest.mark.parametrize(
    ("recipe", "sides", "size"), [("crop", (40, 36), 32), ("crop", (100, 70), 33), ("ca2cl", (90, 99), 90)]
)
def test_views_are_what_a_slow_loop_makes(recipe: str, sides: tuple[int, int], size: int) -> None:
    count = 12 if recipe == "crop" else 4
    views, tiles, keys = views_of(size, recipe), tiles_of(count, max(sides))[:, : sides[0], : sides[1]], keys_of(count)
    table = views.draw(keys, 5, BOTH, sides)
    for number, made in enumerate(views.raw(tiles, keys, 5)):
        rows = table[number]
        expected = [views_oracle.view(tile, row, size) for tile, row in zip(tiles.numpy(), rows, strict=True)]
        check_levels(made.numpy(), np.stack(expected), clahe=recipe == "ca2cl" and number == 0)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("side", "size"), [(72, 33), (40, 64), (48, 48)])
def test_views_do_not_depend_on_the_batch_its_order_or_the_threads(recipe: str, side: int, size: int) -> None:
    tiles, keys, views, threads = tiles_of(21, side), keys_of(21), views_of(size, recipe), torch.get_num_threads()
    strong, weak = views(tiles, keys, 2)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(1))
    try:
        torch.set_num_threads(3)
        shuffled_strong, shuffled_weak = views(tiles[order], keys[order], 2)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(shuffled_strong, strong[order]) and torch.equal(shuffled_weak, weak[order])
    for row in range(21):
        alone = [
            views.strong(tiles[row : row + 1], keys[row : row + 1], 2),
            views.weak(tiles[row : row + 1], keys[row : row + 1], 2),
        ]
        assert torch.equal(alone[0][0], strong[row]) and torch.equal(alone[1][0], weak[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recipe", RECIPES)
def test_views_have_the_form_that_the_encoder_takes(recipe: str, dtype: torch.dtype) -> None:
    tiles, keys = tiles_of(5, 72), keys_of(5)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    views = views_of(40, recipe, dtype=dtype)
    for raw, view in zip(views.raw(tiles, keys, 0), views(tiles, keys, 0), strict=True):
        assert view.shape == (5, 3, 40, 40) and view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        expected = (raw.permute(0, 3, 1, 2) / 255 - mean) / std
        torch.testing.assert_close(
            view.float(), expected.to(dtype).float(), atol=1e-5, rtol=0.01 if dtype != torch.float32 else 0
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_epochs_views_and_seeds_differ(recipe: str) -> None:
    tiles, keys = tiles_of(1, 72).expand(4, -1, -1, -1), keys_of(4)
    strong, weak = views_of(40, recipe)(tiles, keys, 0)
    again, _ = views_of(40, recipe)(tiles, keys, 1)
    assert (strong != weak).any() and (strong != again).any() and (strong[0] != strong[1]).any()


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_tiles_are_left_as_they_were(recipe: str) -> None:
    tiles = tiles_of(3, 72)
    before = tiles.clone()
    views_of(72, recipe)(tiles, keys_of(3), 0)
    assert torch.equal(tiles, before)


def test_a_fine_pattern_does_not_alias() -> None:
    stripes = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    stripes[:, :, ::2] = 255
    table = plain(1, 1)
    assert np.ptp(_render(stripes, table, 50)) > 100
    table["reduce"] = 4
    assert np.abs(_render(stripes, table, 50).astype(float) - 127.5).max() <= 0.5


def test_bad_batches_are_refused() -> None:
    tiles, keys = tiles_of(3, 40), keys_of(3)
    with pytest.raises(ValueError, match="key hashes"):
        views_of()(tiles, keys[:2], 0)
    with pytest.raises(ValueError, match="uint8"):
        views_of()(tiles.float(), keys, 0)
    with pytest.raises(ValueError, match="int64"):
        views_of()(tiles, keys.float(), 0)
