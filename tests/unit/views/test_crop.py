"""The crop recipe: what it draws."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ca2cl.views import crop
from ca2cl.views.crop import CropRecipe
from ca2cl.views.draw.random import Draws

_COUNT = 20_000


def _draw(recipe: CropRecipe, sides: tuple[int, int] = (224, 224)) -> Any:
    draws = Draws(np.arange(_COUNT), seed=3, epoch=1, views=["strong"], names=recipe.draw_names)
    return recipe.draw(draws, ["strong"], sides)[0]


def _area(rows: Any) -> Any:
    a, b, _, d, e, _ = rows["affine"].T.astype(float)
    return abs(a * e - b * d)


def test_windows_lie_on_the_tile_and_cover_their_share() -> None:
    rows = _draw(CropRecipe(64, scale=(0.2, 1.0)))
    a, b, c, d, e, f = rows["affine"].T.astype(float)
    assert max((abs(a) + abs(b) + abs(c)).max(), (abs(d) + abs(e) + abs(f)).max()) <= 1 + 1e-6
    area = _area(rows)
    assert area.min() >= 0.2 - 1e-6 and abs(np.median(area[area < 0.7]) - 0.45) < 0.01
    wide, high = abs(a) + abs(b), abs(d) + abs(e)
    assert (wide / high).max() <= 4 / 3 + 1e-6 and (wide / high).min() >= 3 / 4 - 1e-6
    assert _area(_draw(CropRecipe(64, scale=(1.0, 1.0)))).min() > 0.86


def test_a_window_is_averaged_before_it_shrinks_to_half_or_less() -> None:
    rows = _draw(CropRecipe(64), (500, 400))
    a, b, _, d, e, _ = rows["affine"].T.astype(float)
    shorter = np.minimum((abs(a) + abs(b)) * 400, (abs(d) + abs(e)) * 500)
    assert (rows["reduce"] == np.maximum(np.floor(shorter / 64 + 1e-9), 1)).mean() > 0.999
    assert _draw(CropRecipe(64), (64, 64))["reduce"].max() == 1


def test_how_often_and_how_much() -> None:
    rows = _draw(CropRecipe(224))
    assert abs(rows["stained"].mean() - 0.8) < 0.012 and abs((rows["blur"] > 0).mean() - 0.5) < 0.015
    assert abs(rows["sigma"].mean() - 1.05) < 0.02 and set(rows["radius"]) == {6}
    assert set(_draw(CropRecipe(112))["radius"]) == {3}
    luma = rows["colour"][:, :9].reshape(-1, 3, 3).sum(2)
    np.testing.assert_allclose(luma, luma[:, :1] * np.ones(3), atol=2e-3)  # grey stays grey
    grey = np.ptp(rows["colour"][:, :9].reshape(-1, 3, 3), axis=1).max(1) < 1e-4
    assert abs(grey.mean() - 0.2) < 0.012


def test_strength_0_changes_no_colour_but_makes_some_grey() -> None:
    rows = _draw(CropRecipe(224, strength=0.0))
    identity = np.array((1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0))
    np.testing.assert_allclose(rows["stain"], np.tile(identity, (_COUNT, 1)), atol=1e-6)
    kept = np.abs(rows["colour"][:, :9] - identity[:9]).max(1) < 1e-4
    assert abs(kept.mean() - 0.8) < 0.012 and abs(rows["colour"][:, 9]).max() == 0


def test_twice_as_much_of_a_stain_doubles_its_density() -> None:
    recipe = CropRecipe(224, strength=4.0)
    draws = Draws(np.arange(_COUNT), seed=3, epoch=1, views=["strong"], names=recipe.draw_names)
    rows = recipe.draw(draws, ["strong"], (224, 224))[0]
    for stain, density in zip(("haematoxylin", "eosin", "residual"), crop.STAINS, strict=True):
        gain = np.where(rows["stained"], 1 + 4 * draws.uniform(f"{stain}.gain", -0.25, 0.25)[0], 1)
        moved = rows["stain"][:, :9].reshape(-1, 3, 3) @ density
        np.testing.assert_allclose(moved, gain[:, None] * density, atol=1e-5)


def test_saturation_and_hue_keep_luma() -> None:
    turns = np.array([0.0, 0.06, 1.0])
    matrices = crop.turn_hue(turns).reshape(3, 3, 3)
    np.testing.assert_allclose(matrices[[0, 2]], [np.eye(3)] * 2, atol=1e-9)
    rgb = np.array((0.2, 0.5, 0.7))
    assert abs(crop.LUMA @ matrices[1] @ rgb - crop.LUMA @ rgb) < 2e-3 and abs(matrices[1] @ rgb - rgb).max() > 0.02
    half = crop.saturate(np.array(0.5), np.eye(3).reshape(9)).reshape(3, 3)
    np.testing.assert_allclose(half @ rgb, (rgb + crop.LUMA @ rgb) / 2)


def test_colours_are_one_operation_after_another() -> None:
    recipe = CropRecipe(224)
    draws = Draws(np.arange(50), seed=3, epoch=1, views=["strong"], names=recipe.draw_names)
    rows = recipe.draw(draws, ["strong"], (224, 224))[0]
    image = np.random.default_rng(0).uniform(0, 255, (40, 3))
    for number in range(50):
        on = bool(draws.chance("jitter", 0.8)[0, number])
        b, c, s = (
            1 + on * draws.uniform(name, -reach, reach)[0, number]
            for name, reach in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2))
        )
        coloured = not draws.chance("grey", 0.2)[0, number]
        out = image * b
        out = out * c + (1 - c) * (out @ crop.LUMA).mean()
        out = out * s * coloured + (1 - s * coloured) * (out @ crop.LUMA)[:, None]
        hue = crop.turn_hue(np.array(coloured * on * draws.uniform("hue", -0.05, 0.05)[0, number])).reshape(3, 3)
        matrix, of_grey = rows["colour"][number, :9].reshape(3, 3), rows["colour"][number, 9]
        made = image @ matrix.T + of_grey * (image.mean(0) @ crop.LUMA)
        np.testing.assert_allclose(made, out @ hue.T, atol=0.5 + 0.01 * math.sqrt(out.max()))
