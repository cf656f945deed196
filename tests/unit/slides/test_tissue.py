"""Tissue masks of synthetic slides, shares of boxes against a slow loop, and the sharpness of tiles."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ca2cl.data.synthetic.painting import STAINS, noise
from ca2cl.data.synthetic.tissue import CLASSES, draw_tile
from ca2cl.slides.tissue.density import glass_colour
from ca2cl.slides.tissue.mask import TissueMask, chroma_threshold, shares, tissue_mask
from ca2cl.slides.tissue.sharpness import LEAST_SHARPNESS, is_sharp, sharpness

Pixels = npt.NDArray[np.uint8]
MPP = 7.0
GLASS = 242
INKS = {"pen": [(30, 140, 80), (30, 60, 160), (205, 35, 55)], "black": [(30, 30, 35)]}


def section(stains_HW2: npt.NDArray[np.float64]) -> Pixels:
    """Pixels of haematoxylin and eosin in these amounts on glass, by Beer and Lambert, with a camera's noise."""
    density = stains_HW2 @ STAINS.astype(np.float64)
    noisy = GLASS * 10**-density + np.random.default_rng(1).normal(0, 0.6, density.shape)
    return np.asarray(np.clip(noisy.round(), 0, 255), np.uint8)


def slide(height: int = 160, width: int = 200) -> tuple[Pixels, npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """A disc of stroma with patches of nuclei on glass: pixels, amounts of stains, and where the disc is."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    disc = (y - height / 2) ** 2 + (x - width / 2) ** 2 < (0.35 * height) ** 2
    eosin = 0.25 + 0.04 * noise(rng, (height, width), 2)
    nuclei = 0.12 + 0.03 * noise(rng, (height, width), 2) + 0.15 * (noise(rng, (height, width), 25) > 0.5)
    stains = np.stack([nuclei, eosin], axis=-1) * disc[..., None]
    return section(stains), stains, disc


def agreement(found: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]) -> float:
    return float((found & true).sum() / (found | true).sum())


def test_tissue_is_found_and_nothing_else() -> None:
    pixels, _, disc = slide()
    mask = tissue_mask(pixels, MPP)
    assert agreement(mask.tissue, disc) > 0.97
    assert {name: int(where.sum()) for name, where in mask.artefacts.items()} == {"pen": 0, "black": 0, "fold": 0}


@pytest.mark.parametrize("glass", [255, 242, 225])
def test_an_empty_slide_has_no_tissue(glass: int) -> None:
    noisy = glass + np.random.default_rng(0).normal(0, 0.7, (90, 70, 3))
    assert not tissue_mask(np.clip(noisy.round(), 0, 255).astype(np.uint8), MPP).tissue.any()


@pytest.mark.parametrize("level", [0, 255])
def test_one_colour_has_no_tissue(level: int) -> None:
    assert not tissue_mask(np.full((20, 30, 3), level, np.uint8), MPP).tissue.any()


def test_a_slide_that_is_all_tissue_is_all_tissue() -> None:
    pixels, _, _ = slide(400, 400)
    assert tissue_mask(pixels[160:240, 160:240], MPP).tissue.all()


def test_grey_is_no_tissue() -> None:
    """The edge of a cover glass, a shadow and dust."""
    pixels = np.full((100, 120, 3), GLASS, np.uint8)
    pixels[:, :50] = 215
    pixels[:, 50:53] = 120
    pixels[60:64, 80:84] = 90
    assert not tissue_mask(pixels, MPP).tissue.any()


def test_white_outside_of_the_scanned_region_does_not_count_as_glass() -> None:
    pixels, _, disc = slide()
    pixels = np.minimum(pixels, [236, 226, 232]).astype(np.uint8)
    pixels[:30] = 255
    assert glass_colour(pixels) == (236, 226, 232)
    disc[:30] = False
    assert agreement(tissue_mask(pixels, MPP).tissue, disc) > 0.97


@pytest.mark.parametrize("strength", [0.4, 1.6])
def test_pale_and_dark_stains(strength: float) -> None:
    _, stains, disc = slide()
    assert agreement(tissue_mask(section(stains * strength), MPP).tissue, disc) > 0.95


def test_fat_is_tissue() -> None:
    """Cells of 70 micrometres with walls of a pixel, too pale for the threshold of stained tissue."""
    stains = np.zeros((200, 200, 2))
    for start in range(40, 161, 10):
        stains[40:161, start] = stains[start, 40:161] = (0.01, 0.05)
    pixels = section(stains)
    assert chroma_threshold(np.zeros((2, 2), np.float16)) == pytest.approx(0.033)
    mask = tissue_mask(pixels, MPP)
    assert mask.tissue[42:158, 42:158].mean() > 0.95
    assert not mask.tissue[:30].any()


@pytest.mark.parametrize("blur", [0.5, 4.0])
@pytest.mark.parametrize(("kind", "colour"), [(kind, colour) for kind, colours in INKS.items() for colour in colours])
@pytest.mark.parametrize("on_tissue", [True, False])
def test_ink_is_no_tissue(kind: str, colour: tuple[int, int, int], on_tissue: bool, blur: float) -> None:
    _, stains, disc = slide()
    stains = stains * on_tissue
    amount = np.zeros(disc.shape)
    amount[20:-20, 90:115] = 1
    amount = ndimage.gaussian_filter(amount, blur)[..., None]
    pixels = (section(stains) * (np.array(colour) / GLASS) ** amount).round().astype(np.uint8)
    mask = tissue_mask(pixels, MPP)
    assert mask.artefacts[kind][amount[..., 0] > 0.9].mean() > 0.95
    assert mask.tissue[amount[..., 0] > 0.5].mean() < 0.05
    far = disc & (np.abs(np.arange(disc.shape[1]) - 102) > 40)
    assert not on_tissue or mask.tissue[far].mean() > 0.95


def test_a_black_border_is_no_tissue() -> None:
    pixels, _, disc = slide()
    pixels[:, :12] = 0
    mask = tissue_mask(pixels, MPP)
    assert mask.artefacts["black"][:, :12].all()
    assert agreement(mask.tissue, disc) > 0.97


def test_a_fold_is_found_but_dense_nuclei_are_not() -> None:
    _, stains, disc = slide()
    fold = np.zeros(disc.shape, bool)
    fold[:, 92:107] = True
    nuclei = np.zeros(disc.shape, bool)
    nuclei[60:80, 120:140] = True
    stains = stains * np.where(fold, 2.0, 1.0)[..., None]
    stains[nuclei] = (0.6, 0.1)
    mask = tissue_mask(section(stains), MPP)
    assert mask.artefacts["fold"][fold & disc].mean() > 0.5
    assert mask.artefacts["fold"][disc & ~ndimage.binary_dilation(fold, iterations=4)].mean() < 0.01
    assert mask.tissue[nuclei & disc].all()


def test_resolution_does_not_matter_much() -> None:
    _, stains, disc = slide(320, 400)
    fine = tissue_mask(section(stains), MPP / 2).tissue
    coarse = tissue_mask(section(stains.reshape(80, 4, 100, 4, 2).mean(axis=(1, 3))), 2 * MPP).tissue
    assert agreement(fine, disc) > 0.97
    assert agreement(coarse.repeat(4, axis=0).repeat(4, axis=1), disc) > 0.93


def test_a_mask_may_be_coarser_than_any_operation() -> None:
    pixels, _, disc = slide()
    assert agreement(tissue_mask(pixels, 400.0).tissue, disc) > 0.95


def test_artefacts_and_tissue_do_not_overlap() -> None:
    pixels, _, _ = slide()
    pixels[40:70, 60:140] = (205, 35, 55)
    pixels[80:110, 60:140] = (20, 20, 22)
    mask = tissue_mask(pixels, MPP)
    assert isinstance(mask, TissueMask)
    assert mask.artefacts["pen"].any()
    assert mask.artefacts["black"].any()
    assert np.sum([mask.tissue, *mask.artefacts.values()], axis=0).max() == 1


def slow_share(mask: npt.NDArray[np.bool_], box: npt.NDArray[np.float64]) -> float:
    x0, y0, x1, y1 = box
    covered = 0.0
    for y in range(mask.shape[0]):
        for x in range(mask.shape[1]):
            wide, high = min(x1, x + 1) - max(x0, x), min(y1, y + 1) - max(y0, y)
            if mask[y, x] and wide > 0 and high > 0:
                covered += wide * high
    return float(covered / ((x1 - x0) * (y1 - y0)))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_shares_are_those_of_a_slow_loop(seed: int, height: int, width: int, whole: bool) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((height, width)) < rng.random()
    start = rng.uniform(-4, 10, (5, 2))
    boxes = np.concatenate([start, start + rng.uniform(0.2, 8, (5, 2))], axis=1)
    boxes = np.concatenate([np.floor(boxes[:, :2]), np.floor(boxes[:, :2]) + 3], axis=1) if whole else boxes
    expected = [slow_share(mask, box) for box in boxes]
    np.testing.assert_allclose(shares(mask, boxes), expected, atol=2e-9)


def test_a_box_that_is_half_covered_has_a_share_of_one_half() -> None:
    mask = np.zeros((7, 6), bool)
    mask[:, :3] = True
    side = 2.0 / 3
    boxes = np.array([[3 - side / 2, 1 / 3, 3 + side / 2, 1 / 3 + side], [-3, 0, 3, 7]])
    assert shares(mask, boxes).tolist() == [0.5, 0.5]
    assert shares(mask, np.zeros((0, 4))).shape == (0,)


TISSUE = [label for label in CLASSES if label != "BACK"]


@pytest.mark.parametrize("label", TISSUE)
def test_blurred_tiles_are_rejected_and_sharp_ones_are_not(label: str) -> None:
    for seed in range(2):
        tile = draw_tile(label, seed, 224)
        assert is_sharp(tile, 0.5)
        blurred = ndimage.gaussian_filter(tile.astype(np.float32), (4, 4, 0)).round().astype(np.uint8)
        assert not is_sharp(blurred, 0.5)
        assert is_sharp(blurred, 0.5, least=0)


def test_sharpness_does_not_depend_on_contrast() -> None:
    tile = draw_tile("STR", 0, 224)
    pale = (255 - (255 - tile.astype(np.float64)) / 4).round().astype(np.uint8)
    assert sharpness(pale, 0.5) == pytest.approx(sharpness(tile, 0.5), rel=0.2)


def test_sharpness_is_measured_in_micrometres() -> None:
    tile = draw_tile("TUM", 0, 224)
    fine = tile.repeat(2, axis=0).repeat(2, axis=1)
    assert sharpness(fine, 0.25) == pytest.approx(sharpness(tile, 0.5))
    half = tile.reshape(112, 2, 112, 2, 3).mean(axis=(1, 3))
    assert sharpness(half.round().astype(np.uint8), 1.0) == pytest.approx(sharpness(tile, 0.5), rel=0.02)


def test_empty_glass_is_not_blurred() -> None:
    assert sharpness(np.full((224, 224, 3), 243, np.uint8), 0.5) == float("inf")


@pytest.mark.parametrize("mpp", [0.1, 0.5, 8.0])
def test_the_smallest_tiles_have_a_sharpness(mpp: float) -> None:
    assert sharpness(draw_tile("LYM", 0, 224)[:16, :16], mpp) > LEAST_SHARPNESS
