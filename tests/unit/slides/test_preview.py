"""Pictures of slides with their tiles, and the pages and sheets of them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ca2cl.errors import InputError
from ca2cl.slides.preview import (
    PAGE_PICTURES,
    SHEET_SLIDES,
    Preview,
    draw_preview,
    drawn_slides,
    picture_side,
    write_preview,
)
from ca2cl.slides.tissue.mask import TissueMask

REASONS = ["kept", "background", "pen", "surplus"]


def drawn(side: int = 400, reasons: list[str] | None = None) -> Image.Image:
    thumbnail = np.full((50, 100, 3), 200, np.uint8)
    tissue, pen = np.zeros((25, 50), bool), np.zeros((25, 50), bool)
    tissue[5:20, 5:30], pen[5:20, 30:45] = True, True
    boxes = np.array([[x, 10.0, x + 20, 30.0] for x in (0, 20, 40, 60)])
    return draw_preview(
        thumbnail, TissueMask(tissue, {"pen": pen}, 14.0), boxes, np.array([True, False, False, False]),
        reasons or REASONS, "a slide", side,
    )  # fmt: skip


def picture(colour: int = 0, size: tuple[int, int] = (300, 200)) -> Image.Image:
    return Image.new("RGB", size, (colour, 100, 100))


def test_a_kept_tile_and_a_dropped_one_look_different() -> None:
    pixels = np.asarray(drawn()).astype(int)
    top = pixels[22 + 40]  # the title's line, and the upper edge of the tiles
    assert pixels.shape[1] == 400
    edges = [tuple(top[x + 40]) for x in (0, 80, 160, 240)]
    assert len(set(edges)) == 4
    kept, background, pen, _ = edges
    assert kept[1] > kept[0]
    assert pen[0] > pen[2]
    assert max(background) - min(background) < 10
    assert np.ptp(pixels[22 + 80, 160:240].sum(axis=-1)) > 50, "a stroke through a dropped tile"


def test_the_outline_of_the_tissue_is_drawn() -> None:
    tissue = np.zeros((25, 50), bool)
    tissue[5:20, 5:30] = True
    none = np.zeros((0, 4))
    grey, mask = np.full((50, 100, 3), 200, np.uint8), TissueMask(tissue, {}, 14.0)
    pixels = draw_preview(grey, mask, none, np.zeros(0, bool), [], "", 400)
    black = np.asarray(pixels)[22:].sum(axis=-1) == 0
    rows, columns = np.flatnonzero(black.any(axis=1)), np.flatnonzero(black.any(axis=0))
    assert (rows.min(), rows.max()) == (40, 159)
    assert (columns.min(), columns.max()) == (40, 239)


def test_the_legend_names_the_reasons_that_occur() -> None:
    few, many = drawn(), drawn(reasons=["kept", "background", "a reason of somebody else's", "surplus"])
    assert few.size[0] == 400
    assert many.size[1] >= few.size[1] > 200 + 22


@pytest.mark.parametrize("side", [60, 300, 1500])
def test_any_size(side: int) -> None:
    assert max(drawn(side).size) >= side


@pytest.mark.parametrize("title", ["biopsy-2: 240 of 312 tiles", 40 * "a long name "])
def test_a_title_is_whole_or_cut_within_the_picture(title: str) -> None:
    mask = TissueMask(np.ones((25, 5), bool), {}, 14.0)
    boxes = np.array([[0.0, 0, 10, 10]])
    thumbnail = np.zeros((100, 20, 3), np.uint8)
    drawn = np.asarray(draw_preview(thumbnail, mask, boxes, np.array([True]), ["kept"], title, 300))[:22]
    assert 150 < drawn.shape[1] <= 300
    assert (drawn[:, -4:] == 255).all() and (drawn[:, -30:-6] < 128).any()


def test_no_tile_at_all() -> None:
    mask = TissueMask(np.zeros((10, 5), bool), {}, 7.0)
    nothing = draw_preview(np.zeros((10, 5, 3), np.uint8), mask, np.zeros((0, 4)), np.zeros(0, bool), [], "none", 100)
    assert nothing.size == (50, 122)


def test_a_page_holds_every_slide(tmp_path: Path) -> None:
    path = tmp_path / "slides.html"
    write_preview(path, (Preview(f"slide <{n}>", picture(n), f"{n} & more") for n in range(7)), 7)
    text = path.read_text(encoding="utf-8")
    images = re.findall(r"data:image/jpeg;base64,([\w+/=]+)", text)
    assert [Image.open(io.BytesIO(base64.b64decode(image))).size for image in images] == [(300, 200)] * 7
    assert "slide &lt;6&gt;" in text
    assert "6 &amp; more" in text
    assert "<6>" not in text


def test_a_slide_without_a_picture_has_its_error(tmp_path: Path) -> None:
    write_preview(tmp_path / "a.html", [Preview("broken.svs", None, "no reader opens it")], 1)
    assert "no reader opens it" in (tmp_path / "a.html").read_text()
    write_preview(tmp_path / "a.png", [Preview("broken.svs", None, "no reader opens it")], 1)
    assert (np.asarray(Image.open(tmp_path / "a.png")) < 200).any()


def test_a_sheet_draws_no_more_slides_than_it_shows(tmp_path: Path) -> None:
    taken = []

    def entries() -> Iterator[Preview]:
        for number in range(10_000):
            taken.append(number)
            yield Preview(str(number), picture(number % 256))

    write_preview(tmp_path / "sheet.png", entries(), 10_000)
    assert len(taken) <= SHEET_SLIDES + 1
    assert Image.open(tmp_path / "sheet.png").size[0] == 3200


def test_a_page_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def entries() -> Iterator[Preview]:
        yield Preview("a", picture())
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_preview(tmp_path / "page.html", entries(), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--preview"):
        write_preview(tmp_path / "missing" / "page.html", [], 0)


def test_pictures_are_smaller_the_more_there_are() -> None:
    sides = [picture_side(Path("a.html"), slides) for slides in (1, 100, 101, 1000, 10_000)]
    assert sides == [1000, 1000, 600, 600, 320]
    assert picture_side(Path("a.png"), 1) < 320


@pytest.mark.parametrize("slides", [0, 1, 1000, 1001, 12_345])
def test_a_page_of_many_slides_draws_some_of_them(slides: int) -> None:
    drawn = drawn_slides(Path("a.html"), slides)
    assert min(slides, PAGE_PICTURES / 2) <= len(drawn) <= PAGE_PICTURES
    assert len(drawn) == slides or slides > PAGE_PICTURES
    assert list(drawn_slides(Path("a.png"), slides)) == list(range(min(slides, SHEET_SLIDES)))


def test_a_page_says_how_many_it_draws(tmp_path: Path) -> None:
    write_preview(tmp_path / "a.html", [Preview("a", picture())], 10_000)
    assert "10000 slides, one of 10 drawn" in (tmp_path / "a.html").read_text()
