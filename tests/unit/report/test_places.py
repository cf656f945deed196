"""Tiles at their places on slides, against slow loops."""

from __future__ import annotations

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.tar import TarWriter, find_member
from ca2cl.report.neighbours import nearest, precision
from ca2cl.report.places.slide_maps import MOST_SLIDES, SIDE, SlideMap, draw_slides
from ca2cl.report.places.tile_places import Places, read_places, share_by_chance
from ca2cl.slides.preview import thumbnail
from ca2cl.slides.records import SlideRecord, thumbnail_path, without_shared_folder, write_rows
from tests.support.shards import encode, random_tiles, write_shards


def grid(*slides: tuple[int, int], side: float = 100.0) -> Places:
    """Slides full of tiles of ``side`` micrometres, given as columns and rows."""
    boxes, numbers = [], []
    for number, (columns, rows) in enumerate(slides):
        for row, column in itertools.product(range(rows), range(columns)):
            boxes.append([side * column, side * row, side * (column + 1), side * (row + 1)])
            numbers.append(number)
    return Places([f"s{number}" for number in range(len(slides))], np.array(numbers), np.array(boxes))


def describe(folder: Path, *slides: tuple[str, float, float, int], mpp: float = 0.5) -> None:
    """Write ``slides.jsonl``: name, width and height in micrometres and number of tiles."""
    records = [
        SlideRecord(name, f"{name}.svs", mpp=mpp, levels=[[width / mpp, height / mpp, 1]], kept=kept)
        for name, width, height, kept in slides
    ]
    write_rows(folder / "slides.jsonl", records, "")


@pytest.mark.parametrize("groups", [[0, 0, 0, 1, 1, 2], [0, 0], [-1, 0, 1, 1, -1], [0, 1, 2]])
def test_chance_is_a_slow_loops(groups: list[int]) -> None:
    known = [group for group in groups if group >= 0]
    pairs = [known[a] == known[b] for a, b in itertools.permutations(range(len(known)), 2)]
    assert share_by_chance(np.array(groups)) == pytest.approx(sum(pairs) / len(pairs))
    assert share_by_chance(np.array([-1, 0])) is None


def test_neighbours_without_any_likeness_are_of_the_own_slide_by_chance() -> None:
    slides = np.repeat(np.arange(4), [150, 80, 50, 20])
    features = np.random.default_rng(0).normal(size=(300, 24))
    found, _ = nearest(features / np.linalg.norm(features, axis=1, keepdims=True), 8)
    shares = [np.mean([slides[other] == slides[row] for other in found[row]]) for row in range(300)]
    assert precision(found, slides) == pytest.approx(np.mean(shares))
    assert precision(found, slides) == pytest.approx(share_by_chance(slides), abs=0.03)


def test_squares_lie_where_their_tiles_do() -> None:
    places = grid((10, 6))
    (drawn,) = draw_slides(places, Path("/nowhere"))
    assert (drawn.width, drawn.height, drawn.thumbnail, drawn.size, drawn.kept) == (SIDE, SIDE * 0.6, "", "", None)
    assert (drawn.numbered, drawn.enlarged) == (True, False)
    for square in drawn.squares:
        box = places.boxes_N4[square.row] * SIDE / 1000
        assert (square.x, square.y) == pytest.approx(box[:2], abs=0.051)
        assert (square.width, square.height) == pytest.approx((56, 56), abs=0.051)
    assert (drawn.bar_text, drawn.bar) == ("200 µm", 112)


def test_the_slides_with_the_most_tiles_are_drawn() -> None:
    counts = [3, 9, 1, 7, 9, 2, 8, 4]
    places = grid(*((1, count) for count in counts))
    drawn = draw_slides(places, Path("/nowhere"))
    assert [one.slide for one in drawn] == ["s1", "s4", "s6", "s3", "s7", "s0"]
    assert len(drawn) == MOST_SLIDES
    assert [len(one.squares) for one in drawn] == [9, 9, 8, 7, 4, 3]


def test_a_known_slide_is_drawn_whole_with_its_thumbnail(tmp_path: Path) -> None:
    describe(tmp_path, ("other", 1, 1, 1), ("s0", 4000, 2000, 70))
    thumbnail_path(tmp_path, 1).parent.mkdir()
    thumbnail_path(tmp_path, 1).write_bytes(thumbnail(random_tiles(1, 900)[0]))
    (drawn,) = draw_slides(grid((10, 6)), tmp_path)
    assert (drawn.width, drawn.height, drawn.picture, drawn.kept) == (560, 280, (560, 280), 70)
    assert (drawn.size, drawn.bar_text, drawn.bar) == ("4.00 x 2.00 mm", "1 mm", 140)
    assert drawn.squares[11].x == drawn.squares[11].y == 14
    with Image.open(io.BytesIO(base64.b64decode(drawn.thumbnail.partition(",")[2]))) as image:
        assert max(image.size) == 512
    assert len(thumbnail_path(tmp_path, 1).read_bytes()) <= 30_000  # of noise, which no JPEG makes small
    thumbnail_path(tmp_path, 1).write_bytes(b"cut")
    assert draw_slides(grid((10, 6)), tmp_path)[0].thumbnail == ""
    (tmp_path / "slides.jsonl").write_text("{")
    assert draw_slides(grid((10, 6)), tmp_path)[0].size == ""


def test_names_are_shown_without_the_folder_that_all_share() -> None:
    assert without_shared_folder(["/a/b/c", "/a/b/d"]) == ["c", "d"]
    assert without_shared_folder(["a/bc/x", "a/bd/x", "a/bd/e/y"]) == ["bc/x", "bd/x", "bd/e/y"]
    assert without_shared_folder(["a/b/x"]) == ["x"]
    assert without_shared_folder(["x", "a/x"]) == ["x", "a/x"] and without_shared_folder([]) == []


def test_padded_tiles_make_the_map_larger_than_the_slide(tmp_path: Path) -> None:
    describe(tmp_path, ("s0", 950, 600, 60))
    (drawn,) = draw_slides(grid((10, 6)), tmp_path)
    assert (drawn.width, drawn.height, drawn.picture) == (560, 336, (532, 336))


def small(places: Places, folder: Path) -> SlideMap:
    describe(folder, ("s0", 50_000, 50_000, 9000))
    (drawn,) = draw_slides(places, folder)
    assert not drawn.numbered
    return drawn


def test_small_squares_grow_and_hide_no_neighbour(tmp_path: Path) -> None:
    drawn = small(grid((20, 20)), tmp_path)  # a tile has 1.1 units
    assert not drawn.enlarged
    scattered = grid((20, 20))
    scattered.boxes_N4[:] += scattered.boxes_N4[:, [0, 1, 0, 1]] * 9  # ten times as far apart
    drawn = small(scattered, tmp_path)
    assert drawn.enlarged
    assert {(square.width, square.height) for square in drawn.squares} == {(7, 7)}
    middle = np.array([[square.x + square.width / 2, square.y + square.height / 2] for square in drawn.squares])
    wanted = (scattered.boxes_N4[:, :2] + scattered.boxes_N4[:, 2:]) / 2 * 560 / 50_000
    assert middle == pytest.approx(wanted, abs=0.11)


@pytest.mark.parametrize("key", ["a", "s_x0_y0", 99 * "long", "pa%C3%A9"])
def test_a_member_is_found_behind_another(key: str) -> None:
    file = io.BytesIO()
    writer = TarWriter(file)
    parts = {"png": b"pixels", "cls": b"3", "json": b'{"x": 5}'}
    offset = writer.add(key, parts)
    writer.add("next", {**parts, "json": b"another"})
    writer.close()
    blocks = file.getvalue()[offset + 512 :]
    assert find_member(blocks, key, "json") == b'{"x": 5}'
    assert find_member(blocks, key, "txt") is None
    for length in (*range(0, 2049, 128), 2600):
        assert find_member(blocks[:length], key, "json") in (None, b'{"x": 5}')
    for start in range(0, 1024, 7):  # a damaged header is no place, and no error
        damaged = bytearray(blocks)
        damaged[start : start + 5] = b"\xff\x00\x80zz"
        assert find_member(bytes(damaged), key, "json") in (None, b'{"x": 5}')


def places_of(root: Path) -> Places | None:
    index = ShardIndex(root)
    return read_places(index, ShardReader(root, index=index), [index.locate(sample) for sample in range(len(index))])


def test_places_are_those_of_the_tiles_json(tmp_path: Path) -> None:
    abouts = [
        {"slide": "b", "x": 400, "y": 30, "mpp": 0.5, "slide_mpp": 0.25},
        {"slide": "a", "x": 0, "y": 0, "mpp": 1, "slide_mpp": 1.0},
        {"slide": "b", "x": "400", "y": 30, "mpp": 0.5, "slide_mpp": 0.25},
        {"slide": "b", "x": 400, "y": -30, "mpp": 0.5, "slide_mpp": 0.25},
        {"slide": "b", "x": 10**300, "y": 30, "mpp": 0.5, "slide_mpp": 1e200},
        {"slide": "b", "x": 400, "y": 30, "mpp": 0.5},
        {"group": "b"},
        [],
    ]
    encoded = [encode(tile) for tile in random_tiles(len(abouts))]
    assert places_of(write_shards(tmp_path / "bare", encoded, per_shard=3)) is None
    found = places_of(write_shards(tmp_path / "shards", encoded, per_shard=3, abouts=abouts))
    assert found is not None
    assert (found.slides, found.slide_N.tolist()) == (["a", "b"], [1, 0, -1, -1, -1, -1, -1, -1])
    assert found.boxes_N4[:2].tolist() == [[100, 7.5, 108, 15.5], [0, 0, 16, 16]]
    assert np.isnan(found.boxes_N4[2:]).all()
    assert (found.slide(0), found.position(0), found.slide(2), found.position(2)) == ("b", "0.10, 0.01 mm", "", "")
    assert found.same(0, 0) and not found.same(0, 1) and not found.same(2, 3)
