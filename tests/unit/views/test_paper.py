"""The paper's recipe: how often each operation is drawn, and from which distribution."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from ca2cl.views.draw.random import Draws
from ca2cl.views.draw.table import GAUSSIAN, GRID, MEDIAN, MOTION, NOISE, OPTICAL, View
from ca2cl.views.paper import STRONG, WEAK, PaperRecipe, Probabilities

_COUNT = 20_000
_OFF = Probabilities(*[0.0] * 11)


def _draw(strong: Probabilities = STRONG, view: View = "strong", side: int = 224) -> Any:
    recipe = PaperRecipe(224, strong=strong)
    draws = Draws(np.arange(_COUNT), seed=3, epoch=1, views=[view], names=recipe.draw_names)
    return recipe.draw(draws, [view], (side, side))[0]


def _near(measured: Any, expected: float, deviation: float = 0.5, count: int = _COUNT) -> bool:
    """Whether a mean of ``count`` numbers lies within four of its standard deviations."""
    return bool(abs(np.mean(measured) - expected) <= 4 * deviation / math.sqrt(count))


def test_the_probabilities_are_the_papers() -> None:
    common = {"transpose": 0.5, "vertical": 0.5, "horizontal": 0.5, "brightness": 0.75, "contrast": 0.75, "hsv": 0.5}
    strong = {"shift_scale_rotate": 0.85, "blur": 0.7, "distortion": 0.4, "clahe": 0.7, "cutout": 0.7}
    weak = {"shift_scale_rotate": 0.5, "blur": 0.0, "distortion": 0.0, "clahe": 0.0, "cutout": 0.0}
    assert vars(STRONG) == common | strong and vars(WEAK) == common | weak


@pytest.mark.parametrize("view", ["strong", "weak"])
def test_operations_are_drawn_as_often_as_they_should(view: View) -> None:
    rows, likely = _draw(view=view), STRONG if view == "strong" else WEAK
    assert _near(rows["border"], likely.shift_scale_rotate) and _near(rows["shifted"], likely.hsv)
    assert _near(rows["blur"] > 0, likely.blur) and _near(rows["clip"] > 0, likely.clahe)
    assert _near(rows["hole"][:, 2] > 0, likely.cutout) and set(rows["hole"][:, 2]) <= {0, 84}
    bent = (rows["bend"] > 0) | (abs(rows["turn"][:, [0, 1]]).sum(1) % 1 > 1e-6)
    assert _near(bent, likely.distortion)
    for code, share in ((MOTION, 4), (MEDIAN, 4), (GAUSSIAN, 4), (NOISE, 4)):
        assert _near(rows["blur"] == code, likely.blur / share)
    for code in (OPTICAL, GRID):
        assert _near(rows["bend"] == code, likely.distortion / 3)
    scale = rows["adjust"][:, 0]
    assert _near(scale != 1, likely.contrast) and _near(rows["adjust"][:, 1] != 0, likely.brightness)
    assert rows["reduce"].max() == 1


def test_with_all_operations_off_a_view_is_the_tile() -> None:
    rows = _draw(_OFF)
    for name, value in (("border", 0), ("bend", 0), ("blur", 0), ("clip", 0), ("shifted", 0)):
        assert (rows[name] == value).all()
    for name in ("affine", "turn"):
        assert (rows[name] == (1, 0, 0, 0, 1, 0)).all()
    assert (rows["adjust"] == (1, 0, 255)).all() and (rows["hole"][:, 2] == 0).all()
    assert (_draw(_OFF, side=1000)["reduce"] == 4).all()


@pytest.mark.parametrize("code", range(8))
def test_each_of_the_eight_orientations_is_drawn_as_often(code: int) -> None:
    turns = _draw(Probabilities(distortion=0.0))["turn"][:, [0, 1, 3, 4]]
    found, counts = np.unique(turns, axis=0, return_counts=True)
    assert len(found) == 8 and _near(counts[code] / _COUNT, 1 / 8)


def test_brightness_is_added_then_contrast_multiplies_and_both_are_held_in_range() -> None:
    scale, offset, highest = _draw(Probabilities(brightness=1.0, contrast=1.0))["adjust"].T
    assert abs(scale - 1).max() < 0.2001 and _near(scale, 1, 0.2 / math.sqrt(3))
    added = offset / scale
    assert 50 < abs(added).max() <= 51.001 and _near(added, 0, 51 / math.sqrt(3))
    for value in (0, 128, 255):
        one_by_one = np.clip(np.clip(value + added, 0, 255) * scale, 0, 255)
        np.testing.assert_allclose(np.clip(value * scale + offset, 0, highest), one_by_one, atol=1e-3)


def test_sizes_of_kernels_and_lines_of_motion() -> None:
    rows = _draw(Probabilities(blur=1.0))
    gaussian = rows[rows["blur"] == GAUSSIAN]
    assert _near(gaussian["radius"] == 2, 2 / 3, count=len(gaussian))
    assert set(zip(gaussian["radius"].tolist(), gaussian["sigma"].round(4).tolist(), strict=True)) == {
        (1, np.float32(0.8)),
        (2, np.float32(1.1)),
    }
    median = rows[rows["blur"] == MEDIAN]
    assert _near(median["radius"] == 2, 1 / 2, count=len(median))
    for radius in (1, 2):
        lines = rows["line"][(rows["blur"] == MOTION) & (rows["radius"] == radius)]
        assert abs(lines).max() == radius
        # Oracle: two pixels of the kernel, x each alike, y as well but for one that would make them the same.
        side = range(-radius, radius + 1)
        taps = [
            (1 + max(abs(b - a), abs(d - c)), len(side) ** -3.0 / (len(side) - (a == b)))
            for a, b, c, d in itertools.product(side, repeat=4)
            if (a, c) != (b, d)
        ]
        assert sum(share for _, share in taps) == pytest.approx(1)
        mean = sum(length * share for length, share in taps)
        measured = 1 + np.maximum(abs(lines[:, 2] - lines[:, 0]), abs(lines[:, 3] - lines[:, 1]))
        assert measured.min() == 2 and _near(measured, mean, 1.2, len(lines))


def test_a_motion_is_2_87_pixels_on_the_mean() -> None:
    rows = _draw(Probabilities(blur=1.0))
    lines = rows["line"][rows["blur"] == MOTION]
    taps = 1 + np.maximum(abs(lines[:, 2] - lines[:, 0]), abs(lines[:, 3] - lines[:, 1]))
    assert _near(taps, 2.87, 1.0, len(lines))


def test_noise_has_variances_from_5_to_30() -> None:
    rows = _draw(Probabilities(blur=1.0))
    variance = rows["deviation"] ** 2
    assert variance.min() >= 5 and variance.max() <= 30.001 and _near(variance, 17.5, 25 / math.sqrt(12))
    assert len(np.unique(rows["noise"])) > 0.99 * _COUNT


def test_clips_are_whole_pixels_of_a_cell() -> None:
    clips = _draw(Probabilities(clahe=1.0))["clip"]
    expected = np.maximum(np.floor(np.linspace(1, 4, 3001) * 28 * 28 / 256), 1)
    assert _near(clips, expected.mean(), expected.std()) and (clips == clips.round()).all()


def test_elastic_grows_and_shrinks_as_its_inverse_does() -> None:
    rows = _draw(Probabilities(distortion=1.0))
    turn = rows["turn"][rows["bend"] == 0].astype(float)
    area = abs(turn[:, 0] * turn[:, 4] - turn[:, 1] * turn[:, 3])
    # Points move by up to 50 of 224 pixels, in the image: read backwards, twice the area in 9.6 % of the draws.
    assert _near(area > 2, 0.096, 0.295, len(area)) and _near(area < 0.5, 0.0115, 0.107, len(area))
    assert area.max() <= 100.01


def test_distortions_have_their_ranges() -> None:
    rows = _draw(Probabilities(distortion=1.0))
    assert _near(rows["optical"], 0, 1 / math.sqrt(3)) and abs(rows["optical"]).max() <= 1
    for name in ("grid_x", "grid_y"):
        assert rows[name].min() >= 0 and rows[name].max() <= 2
        assert all(_near(rows[name][:, cell], 1, 1 / math.sqrt(3)) for cell in range(5))


def test_shift_scale_and_rotation_have_their_ranges() -> None:
    a, b, c, d, e, f = _draw(Probabilities(shift_scale_rotate=1.0))["affine"].T.astype(float)
    scale, angle = 1 / np.hypot(a, d), np.degrees(np.arctan2(d, a))
    assert scale.min() >= 0.9 and scale.max() <= 1.1 and _near(scale, 1, 0.1 / math.sqrt(3))
    assert abs(angle).max() <= 15.001 and _near(angle, 0, 15 / math.sqrt(3))
    shift_x, shift_y = -(e * c - b * f) * scale**2 / 2, -(a * f - d * c) * scale**2 / 2
    for shift in (shift_x, shift_y):
        assert abs(shift).max() <= 0.1001 and _near(shift, 0, 0.1 / math.sqrt(3))


def test_a_hole_is_drawn_about_any_pixel_and_moved_in_at_the_top_and_left() -> None:
    top, left, _ = _draw(Probabilities(cutout=1.0))["hole"].T
    for at in (top, left):
        assert at.min() == 0 and at.max() == 223 - 42 and _near(at == 0, 43 / 224)


def test_colours_shift_by_opencvs_units() -> None:
    hue, saturation, value = _draw()["hsv"].T
    for shift, reach in ((hue, 10 / 30), (saturation, 20 / 255), (value, 10 / 255)):
        assert abs(shift).max() <= reach * 1.0001 and _near(shift, 0, reach / math.sqrt(3))
