"""Slides of every kind read alike, and files that are none are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ca2cl.slides.grid import make_grid, read_scaled
from ca2cl.slides.readers.base import SlideError
from ca2cl.slides.readers.open import open_slide
from tests.support.slides import halved, tissue_picture, write_flat_tiff, write_ome, write_svs

PICTURE = tissue_picture(1000, 700)


def make(kind: str, folder: Path) -> Path:
    """A file of this kind with ``PICTURE``, .5 micrometres a pixel where its kind can state them."""
    if kind == "svs":
        return write_svs(folder / "a.svs", PICTURE, 0.5, levels=(2,))
    if kind == "ome":
        return write_ome(folder / "a.ome.tif", PICTURE, 0.5, levels=(1, 2))
    if kind == "flat":
        return write_flat_tiff(folder / "a.tif", PICTURE, 0.5)
    Image.fromarray(PICTURE).save(folder / "a.png")
    return folder / "a.png"


@pytest.mark.parametrize(
    ("kind", "mpp", "downsamples", "vendor"),
    [
        ("svs", 0.5, [1, 4], "aperio"),
        ("ome", 0.5, [1, 2, 4], "ome-tiff"),
        ("flat", 0.5, [1], "tiff"),
        ("png", None, [1], "image"),
    ],
)
def test_every_kind_gives_its_pixels(tmp_path, kind, mpp, downsamples, vendor):
    slide = open_slide(make(kind, tmp_path))
    assert slide.mpp == (pytest.approx(mpp) if mpp else None)
    assert [round(level.downsample) for level in slide.levels] == downsamples
    assert slide.vendor == vendor
    assert (slide.read(0, 300, 200, 100, 50) == PICTURE[200:250, 300:400]).all()
    beyond = slide.read(0, -10, 690, 30, 30)
    assert (beyond[:10, 10:] == PICTURE[690:, :20]).all()
    assert (beyond[10:] == 255).all()
    assert (beyond[:, :10] == 255).all()
    if len(downsamples) > 1:
        assert (slide.read(len(downsamples) - 1, 20, 10, 30, 20) == halved(PICTURE, 2)[10:30, 20:50]).all()
    slide.close()


def test_a_tile_is_the_same_from_any_kind(tmp_path):
    tiles = []
    for kind in ("svs", "ome", "flat", "png"):
        slide = open_slide(make(kind, tmp_path))
        grid = make_grid(slide.levels[:1], 0.5, 0.7, tile=100, overlap=0, pad=False)
        tiles.append(grid.read(slide, 2, 1))
    assert all((tile == tiles[0]).all() for tile in tiles[1:])


def test_neighbouring_tiles_have_no_seam(tmp_path):
    """Tiles side by side are the slide at their resolution, read as a whole."""
    slide = open_slide(make("svs", tmp_path))
    grid = make_grid(slide.levels, 0.5, 0.83, tile=64, overlap=0, pad=True)
    whole = read_scaled(slide, grid.level, grid.scale, 0, 0, grid.columns * 64, grid.rows * 64)
    for row in range(grid.rows):
        for column in range(grid.columns):
            part = whole[64 * row : 64 * row + 64, 64 * column : 64 * column + 64]
            assert np.abs(part.astype(int) - grid.read(slide, column, row)).max() <= 1  # of rounding, at ties


def test_a_large_region_is_read_in_bands(tmp_path, monkeypatch):
    slide = open_slide(make("png", tmp_path))
    whole = read_scaled(slide, 0, 3.3, 0, 0, 300, 200)
    monkeypatch.setattr("ca2cl.slides.grid._MOST_PIXELS", 20_000)
    assert np.abs(whole.astype(int) - read_scaled(slide, 0, 3.3, 0, 0, 300, 200)).max() <= 1


def test_a_pixel_is_where_a_supersampled_reference_has_it(tmp_path):
    """An edge in the picture lies at the same place, to half a pixel, whatever level is read."""
    picture = np.full((800, 1200, 3), 250, np.uint8)
    picture[:, 512:] = 40
    slide = open_slide(write_svs(tmp_path / "edge.svs", picture, 0.25, levels=(1, 2)))
    for mpp in (0.25, 0.37, 0.5, 0.61, 1.0, 1.7):
        grid = make_grid(slide.levels, 0.25, mpp, tile=64, overlap=0, pad=True)
        row = np.concatenate([grid.read(slide, column, 0)[32, :, 0] for column in range(grid.columns)])
        edge = (250 - row[: int(1200 * 0.25 / mpp)].astype(float)).cumsum()  # the integral tells the edge below a pixel
        assert len(row[: int(1200 * 0.25 / mpp)]) - edge[-1] / 210 == pytest.approx(512 * 0.25 / mpp, abs=0.5)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.svs", b"not a slide", r"a\.svs: OpenSlide cannot open it \(.*\); restore it, convert it"),
        ("a.tif", b"II*\0" + bytes(100), r"a\.tif: OpenSlide cannot open it \(.*\), and tifffile cannot open it"),
        ("a.png", b"\x89PNG\r\n", r"a\.png: not an image that Pillow decodes"),
        ("a.svs", None, r"a\.svs: cannot be read \(No such file or directory\)"),
    ],
)
def test_what_is_no_slide_is_one_line(tmp_path, name, data, message):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(SlideError, match=message) as caught:
        open_slide(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_the_dots_an_inch_of_a_screen_are_no_resolution(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(PICTURE).save(path, dpi=(72, 72))
    assert open_slide(path).mpp is None


def test_grey_and_deep_tiffs_are_refused(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "a.tif", np.zeros((300, 300), np.uint16))
    with pytest.raises(SlideError, match=r"only 8-bit RGB slides are read"):
        open_slide(tmp_path / "a.tif")
