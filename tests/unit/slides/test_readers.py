"""Slides of every kind read alike, and files that are none are refused in one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from ca2cl.slides.grid import make_grid, read_scaled
from ca2cl.slides.readers.base import SlideError
from ca2cl.slides.readers.open import open_slide
from ca2cl.slides.readers.openslide import OpenSlideReader
from tests.support.slides import halved, tissue_picture, write_flat_tiff, write_ome, write_svs
from tests.support.vendors import write_generic, write_leica, write_philips

PICTURE = tissue_picture(1000, 700)
REAL = Path(__file__).parents[4] / "shared" / "data" / "slides" / "CMU-1-Small-Region.svs"


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


class Counted:
    """A slide, and how often it was read."""

    def __init__(self, slide):
        self.slide, self.reads = slide, 0

    def read(self, *region):
        self.reads += 1
        return self.slide.read(*region)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.61, 1.0])
@pytest.mark.parametrize("overlap", [0, 7])
def test_tiles_that_are_read_at_once_are_those_read_alone(tmp_path, mpp, overlap):
    slide = open_slide(write_svs(tmp_path / "a.svs", tissue_picture(800, 600), 0.25, levels=(2,)))
    grid = make_grid(slide.levels, 0.25, mpp, tile=24, overlap=overlap, pad=True)
    assert grid.downsample == (4 if mpp == 1.0 else 1)
    numbers = np.flatnonzero(np.random.default_rng(0).random(len(grid)) < 0.7)
    counted = Counted(slide)
    places = []
    for place, pixels in grid.read_tiles(counted, numbers):
        places.append(place)
        assert (pixels == grid.read(slide, *grid.corners()[numbers[place]].tolist())).all()
    assert sorted(places) == list(range(len(numbers)))
    assert counted.reads < len(numbers) / 8


@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_jpeg_tiles_are_those_of_openslide(tmp_path, photometric):
    """Also beyond every edge. A tile that libjpeg refuses is left to OpenSlide, and so is an interpolated level."""
    picture = tissue_picture(1000, 700)
    path = write_svs(tmp_path / "a.svs", picture, 0.5, levels=(1, 2), compression="jpeg", photometric=photometric)
    assert open_slide(path).levels[2].downsample == 4
    slide, other = OpenSlideReader(path), openslide.OpenSlide(path)
    draw = np.random.default_rng(0)
    for level, (width, height) in enumerate(other.level_dimensions):
        for _ in range(8):
            x, y, w, h = (int(draw.integers(*ends)) for ends in ((-99, width), (-99, height), (1, 500), (1, 500)))
            region = np.asarray(other.read_region((x << level, y << level), level, (w, h)))
            expected = np.where(region[..., 3:] > 0, region[..., :3], 255)
            assert (slide._tiles_of(level).read(x, y, w, h) == expected).all()
            assert (slide.read(level, x, y, w, h) == expected).all()
    other.close()
    data = path.read_bytes()
    with tifffile.TiffFile(path) as file:
        start, size = file.pages[0].dataoffsets[0], file.pages[0].databytecounts[0]
    path.write_bytes(data[: start + size // 2] + bytes(size - size // 2) + data[start + size :])
    damaged = OpenSlideReader(path)
    assert damaged._tiles_of(0).read(0, 0, 9, 9) is None
    assert (damaged.read(0, 500, 300, 50, 50) == slide.read(0, 500, 300, 50, 50)).all()
    odd = OpenSlideReader(write_svs(tmp_path / "b.svs", picture[:, :999], 0.5, levels=(2,), compression="jpeg"))
    assert odd._tiles_of(1) is None


@pytest.mark.skipif(not REAL.is_file(), reason="needs the real slide in ../shared/data/slides")
def test_a_real_slide_whose_tiles_share_their_tables():
    """Its TIFF says that they are RGB, and they do not."""
    slide, other = OpenSlideReader(REAL), openslide.OpenSlide(REAL)
    assert slide._tiles_of(0) is not None
    for x, y in ((1000, 1300), (2100, 2900), (-50, 100)):
        region = np.asarray(other.read_region((x, y), 0, (300, 200)))
        expected = np.where(region[..., 3:] > 0, region[..., :3], 255)
        assert (slide._tiles_of(0).read(x, y, 300, 200) == expected).all()
    other.close()


def test_scattered_tiles_and_interpolated_levels_are_read_alone(tmp_path):
    """Where a level's downsample is no whole number, OpenSlide interpolates, by where a region begins."""
    slide = open_slide(write_svs(tmp_path / "a.svs", tissue_picture(802, 641), 0.25, levels=(2,)))
    fine, coarse = (make_grid(slide.levels, 0.25, mpp, tile=24, overlap=0, pad=False) for mpp in (0.25, 1.3))
    assert coarse.downsample > 4
    for grid, numbers in ((fine, np.array([0, 7, 16 * fine.columns + 9])), (coarse, np.arange(len(coarse)))):
        counted = Counted(slide)
        assert len(list(grid.read_tiles(counted, numbers))) == counted.reads == len(numbers)


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


def waves(left, top, width, height, mpp):
    """Pixels of a picture that is given in micrometres, each the mean of 4 x 4 points."""
    x = (left + (np.arange(4 * width) + 0.5) / 4) * mpp
    y = ((top + (np.arange(4 * height) + 0.5) / 4) * mpp)[:, None]
    fine = 128 + 50 * np.sin(x / 3.7 + y / 8.1) + 50 * np.sin(y / 3.1 - x / 10.7)
    return fine.reshape(height, 4, width, 4).mean((1, 3))


def shift(found, expected):
    """By how many pixels ``found`` lies right of and below ``expected``, by least squares."""
    down, right = np.gradient(expected)
    slopes = np.stack([right.ravel(), down.ravel()], axis=1)
    return -np.linalg.lstsq(slopes, (found - expected).ravel(), rcond=None)[0]


@pytest.mark.parametrize(("width", "height", "most"), [(600, 400, 0.02), (603, 401, 0.6)])
@pytest.mark.parametrize("kind", ["svs", "jpeg", "ome"])
def test_pixels_are_where_a_supersampled_reference_has_them(tmp_path, kind, width, height, most):
    """Whatever level is read. Where sides are odd, OpenSlide's downsample is that of the rounded sides."""
    grey = np.rint(waves(0, 0, width, height, 0.25)).astype(np.uint8)
    picture = np.repeat(grey[..., None], 3, axis=2)
    if kind == "ome":
        slide = open_slide(write_ome(tmp_path / "a.ome.tif", picture, 0.25, levels=(1, 2)))
    else:
        compression = "jpeg" if kind == "jpeg" else "deflate"
        slide = open_slide(write_svs(tmp_path / "a.svs", picture, 0.25, levels=(1, 2), compression=compression))
    for mpp in (0.25, 0.37, 0.5, 0.61, 1.0, 1.3):
        grid = make_grid(slide.levels, 0.25, mpp, tile=48, overlap=0, pad=False)
        numbers = np.array([0, len(grid) - 1])
        for place, pixels in grid.read_tiles(slide, numbers):
            left, top, _, _ = grid.boxes(grid.corners(numbers))[place] * (0.25 / mpp)
            across, down = shift(pixels[..., 0].astype(float), waves(left, top, 48, 48, mpp))
            assert max(abs(across), abs(down)) < most, (mpp, place)


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


def test_pixels_that_are_not_square_are_no_resolution(tmp_path):
    slide = open_slide(write_generic(tmp_path / "a.tif", PICTURE, (0.25, 0.5)))
    assert (slide.mpp, slide.hint) == (None, "0.25 x 0.5 micrometres, not square")
    slide = open_slide(write_philips(tmp_path / "b.tiff", PICTURE, (0.5, 0.25)))
    assert (slide.vendor, slide.mpp, slide.hint) == ("philips", None, "0.5 x 0.25 micrometres, not square")


@pytest.mark.parametrize(("size", "unit", "mpp"), [(250, "nm", 0.25), (0.0005, "mm", 0.5), (0.5, "µm", 0.5)])
def test_units_of_ome(tmp_path, size, unit, mpp):
    facts = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
    facts |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(tmp_path / "a.ome.tif", PICTURE, photometric="rgb", tile=(128, 128), metadata=facts)
    assert open_slide(tmp_path / "a.ome.tif").mpp == pytest.approx(mpp)


def test_other_vendors(tmp_path):
    philips = open_slide(write_philips(tmp_path / "a.tiff", PICTURE, (0.5, 0.5)))
    leica = open_slide(write_leica(tmp_path / "a.scn", PICTURE, 0.5, (3000, 2600), (1200, 800)))
    generic = open_slide(write_generic(tmp_path / "a.tif", PICTURE, (0.5, 0.5), bigtiff=True))
    for slide, vendor, x, y in (
        (philips, "philips", 0, 0),
        (leica, "leica", 1200, 800),
        (generic, "generic-tiff", 0, 0),
    ):
        assert (slide.vendor, slide.mpp) == (vendor, pytest.approx(0.5, rel=1e-3))
        assert len(slide.levels) > 1
        assert (slide.read(0, x + 300, y + 200, 100, 50) == PICTURE[200:250, 300:400]).all()
    assert leica.bounds == (1200, 800, 2200, 1500)
    assert (leica.levels[0].width, leica.levels[0].height) == (3000, 2600)
    assert (leica.read(0, 0, 0, 50, 50) == 255).all()


def test_grey_and_deep_tiffs_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((300, 300), np.uint16))
    with pytest.raises(SlideError, match=r"only 8-bit RGB slides are read"):
        open_slide(tmp_path / "a.tif")
