"""Centres of tiles: by pattern, column, CSV and set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.errors import InputError
from ca2cl.evaluation.centers.assignment import TileSet, centers_of
from ca2cl.evaluation.centers.measure import assign
from ca2cl.slides.records import SLIDES_NAME, SlideRecord, write_rows
from tests.support.shards import encode, random_tiles

NAMES = ("a/TCGA-A6-01_1.png", "a/TCGA-AA-02_1.png", "b/TCGA-A6-01_2.png", "b/lab.7 x_3.png")


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> TileSet:
    root = tmp_path_factory.mktemp("centres")
    for name, pixels in zip(NAMES, random_tiles(4), strict=True):
        (root / "tiles" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "tiles" / name).write_bytes(encode(pixels))
    config = ShardConfig(source=str(root / "tiles"), out=str(root / "s"), workers=1, group_pattern=r"(TCGA-..-\d+)")
    shard(config)
    index = ShardIndex(root / "s")
    keys = [str(key) for part in index for key in part.key]
    order = np.argsort(keys).tolist()  # that of NAMES
    return TileSet("test", str(root / "s"), index, order)


def test_a_pattern_is_searched_in_the_path_and_then_in_the_slide(tiles: TileSet) -> None:
    assert centers_of(r"TCGA-(..)", tiles) == ["A6", "AA", "A6", None]
    assert centers_of(r"b/lab\.7 x|^TCGA-..", tiles) == ["TCGA-A6", "TCGA-AA", "TCGA-A6", "b/lab.7 x"]


def test_columns_and_sets(tiles: TileSet) -> None:
    assert centers_of("group", tiles) == ["TCGA-A6-01", "TCGA-AA-02", "TCGA-A6-01", None]
    assert centers_of("set", tiles) == ["test"] * 4


def test_a_csv_names_tiles_slides_or_paths(tiles: TileSet, tmp_path: Path) -> None:
    path = tmp_path / "centers.csv"
    path.write_text("group,center,more\nTCGA-A6-01,Ulm,1\nTCGA-AA-02,Linz,2\nX,Graz,3\n")
    assert centers_of(str(path), tiles) == ["Ulm", "Linz", "Ulm", None]
    path.write_text("path,center\nb/lab.7 x_3,Ulm\n")
    assert centers_of(str(path), tiles) == [None, None, None, "Ulm"]


def test_slides_know_their_vendor(tiles: TileSet) -> None:
    records = [SlideRecord("b/lab.7 x_3", "x.svs", vendor="aperio"), SlideRecord("a/TCGA-A6-01_1", "y", vendor=None)]
    path = Path(tiles.root) / SLIDES_NAME
    write_rows(path, records, "")
    assert centers_of("vendor", tiles) == [None, None, None, "aperio"]
    path.unlink()
    with pytest.raises(InputError, match=r"center is 'vendor': .*slides.jsonl is missing"):
        centers_of("vendor", tiles)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("TCGA-(", "not a regular expression"),
        ("BRCA-(..)", "gives no tile of .* a centre; the first is 'a/TCGA-A6-01_1', of slide or patient 'TCGA-A6-01'"),
        ("/nowhere/x.csv", "cannot be read"),
    ],
)
def test_a_mistake_is_one_line(tiles: TileSet, setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        centers_of(setting, tiles)


def test_a_csv_without_the_columns_is_refused(tiles: TileSet, tmp_path: Path) -> None:
    path = tmp_path / "centers.csv"
    path.write_text("slide,scanner\nx,y\n")
    with pytest.raises(InputError, match="has the columns slide, scanner; give center and one of key, path, slide, gr"):
        centers_of(str(path), tiles)


def test_one_centre_is_refused_before_a_tile_is_read(tiles: TileSet) -> None:
    with pytest.raises(InputError, match="finds one centre, TCGA, in the test tiles"):
        assign("(TCGA)", [tiles], None)
    with pytest.raises(InputError, match="center is 'set': finds one centre, test, .*; give .* give several test sets"):
        assign("set", [tiles], None)
    both = assign("TCGA-(..)", [tiles], TileSet("train", tiles.root, tiles.index, tiles.samples[:3]))
    assert set(both) == {"test", "train"} and len(both["train"]) == 3
