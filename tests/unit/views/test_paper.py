"""The paper's recipe: which operations happen how often, and what they do to an image."""

from __future__ import annotations

import math

import pytest
import torch

from ca2cl.models.preprocess import to_planes
from ca2cl.views import paper
from ca2cl.views.ops.random import Draws
from ca2cl.views.paper import STRONG, WEAK, PaperRecipe, Probabilities

NONE = Probabilities(*[0.0] * 11)
_COUNT = 600


def _draws(count: int = _COUNT, view: str = "strong") -> Draws:
    return Draws(torch.arange(count), seed=3, epoch=1, view=view)


def _images(count: int, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(count, 3, side, side, generator=generator) * 0.5 + 0.25


def _only(name: str, probability: float = 1.0) -> PaperRecipe:
    return PaperRecipe(32, strong=Probabilities(**{**vars(NONE), name: probability}))


def test_with_all_operations_off_a_view_is_the_tile() -> None:
    tiles = torch.randint(0, 256, (5, 48, 48, 3), dtype=torch.uint8)
    recipe = PaperRecipe(48, strong=NONE, weak=NONE)
    for view in (recipe.strong, recipe.weak):
        torch.testing.assert_close(view(to_planes(tiles), _draws(5)), to_planes(tiles), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", list(vars(STRONG)))
@pytest.mark.parametrize("likely", [STRONG, WEAK], ids=["strong", "weak"])
def test_operations_happen_as_often_as_they_should(name: str, likely: Probabilities) -> None:
    probability = getattr(likely, name)
    images = _images(1).expand(_COUNT, -1, -1, -1).contiguous()
    out = _only(name, probability).strong(images, _draws())
    # An operation moves some pixel by far more than the reading of the grid rounds.
    share = ((out - images).abs().amax((1, 2, 3)) > 1e-3).double().mean()
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / _COUNT)


def test_the_probabilities_are_the_papers() -> None:
    common = {"transpose": 0.5, "vertical": 0.5, "horizontal": 0.5, "brightness": 0.75, "contrast": 0.75, "hsv": 0.5}
    strong = {"shift_scale_rotate": 0.85, "blur": 0.7, "distortion": 0.4, "clahe": 0.7, "cutout": 0.7}
    weak = {"shift_scale_rotate": 0.5, "blur": 0.0, "distortion": 0.0, "clahe": 0.0, "cutout": 0.0}
    assert vars(STRONG) == common | strong and vars(WEAK) == common | weak


def test_brightness_is_added_then_contrast_multiplies_and_both_are_held_in_range() -> None:
    images = torch.linspace(0, 1, 256).view(1, 1, 16, 16).repeat(40, 3, 1, 1)
    draws, out = _draws(40), torch.linspace(0, 1, 256).view(1, 1, 16, 16).repeat(40, 3, 1, 1)
    paper.adjust(out, draws, Probabilities(brightness=0.7, contrast=0.7))
    for row in range(40):
        added = draws.uniform("brightness.by", -0.2, 0.2)[row] if draws.chance("brightness", 0.7)[row] else 0.0
        factor = 1 + draws.uniform("contrast.by", -0.2, 0.2)[row] if draws.chance("contrast", 0.7)[row] else 1.0
        for value, result in zip(
            images[row, 0].flatten().tolist()[::17], out[row, 0].flatten().tolist()[::17], strict=True
        ):
            expected = min(max(min(max(value + added, 0.0), 1.0) * factor, 0.0), 1.0)
            assert result == pytest.approx(float(expected), abs=1e-5)


def test_cut_out_zeroes_one_square_of_three_eighths() -> None:
    images, draws = _images(200), _draws(200)
    out = _only("cutout").strong(images, draws)
    for row in range(200):
        gone = out[row].amax(0) == 0
        rows, columns = torch.nonzero(gone.any(1)).flatten(), torch.nonzero(gone.any(0)).flatten()
        assert gone.sum() == len(rows) * len(columns) and len(rows) <= 12 and len(columns) <= 12
        top, left = int(draws.choice("cutout.y", 32)[row]) - 6, int(draws.choice("cutout.x", 32)[row]) - 6
        assert rows[0] == max(top, 0) and columns[0] == max(left, 0)
        assert rows[-1] == min(max(top, 0) + 11, 31) and columns[-1] == min(max(left, 0) + 11, 31)


def test_shift_scale_rotate_leaves_a_zero_border_and_distortion_none() -> None:
    images = torch.full((60, 3, 32, 32), 0.5)
    turned = _only("shift_scale_rotate").strong(images, _draws(60))
    assert (turned.amin((1, 2, 3)) == 0).double().mean() > 0.9
    assert turned.max() <= 0.5 + 1e-5
    bent = _only("distortion").strong(images, _draws(60))
    torch.testing.assert_close(bent, images, atol=1e-5, rtol=0)


def test_colour_does_not_reach_the_zero_border() -> None:
    images, draws = _images(80), _draws(80)
    geometry_only = _only("shift_scale_rotate").strong(images, draws)
    likely = Probabilities(**{**vars(NONE), "shift_scale_rotate": 1.0, "brightness": 1.0, "blur": 1.0, "clahe": 1.0})
    everything = PaperRecipe(32, strong=likely).strong(images, draws)
    outside = geometry_only.amax(1) == 0
    assert outside.any() and everything.amax(1)[outside].max() == 0


@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_each_member_of_the_blurs_changes_its_samples(which: int) -> None:
    images, draws = _images(100), _draws(100)
    out = _only("blur").strong(images, draws)
    mine = draws.choice("blur.which", 4) == which
    assert 10 < mine.sum() < 45
    variance = out[mine].var((2, 3)).mean() / images[mine].var((2, 3)).mean()
    # Blurs take variance away; noise of variance 5 to 30 adds about 17.5 / 255².
    if which == 3:
        added = (out[mine] - images[mine]).var() * 255**2
        assert 14 < added < 21
    else:
        assert variance < 0.6
