"""Files that say that they are to be shown turned: counted by what takes tiles, as they are stored everywhere."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.sources.base import SourceOptions
from ca2cl.detection.prepare.config import PrepareConfig
from ca2cl.detection.prepare.layouts import find_pictures
from ca2cl.detection.prepare.run import prepare
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.tiles import DecodeRange, open_tiles
from tests.support.glands import write_pairs

KINDS = ("JPEG", "PNG", "TIFF", "WEBP")


def pixels() -> np.ndarray:
    y, x = np.mgrid[:32, :32]
    return np.stack([x * 8, y * 8, x * 0], -1).astype(np.uint8)


def turned(kind: str, orientation: int = 6) -> bytes:
    exif, content = Image.Exif(), io.BytesIO()
    exif[274] = orientation
    Image.fromarray(pixels()).save(content, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    return content.getvalue()


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Four turned tiles and one that is not."""
    (tmp_path / "in" / "A").mkdir(parents=True)
    for kind in KINDS:
        (tmp_path / "in" / "A" / f"{kind}.{kind.lower()}").write_bytes(turned(kind))
    (tmp_path / "in" / "A" / "plain.png").write_bytes(turned("PNG", 1))
    return tmp_path / "in"


@pytest.mark.parametrize("encode", ["keep", "png"])
def test_shards_hold_tiles_as_stored_and_say_how_many_were_to_be_turned(
    encode: str, tiles: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert main(["shard", str(tiles), str(tmp_path / "out"), "--encode", encode, "--workers", "1"]) == 0
    assert [text for text in caplog.messages if "turned" in text] == [
        "4 tiles say that they are to be shown turned (EXIF orientation); they stay as stored"
    ]
    index = ShardIndex(tmp_path / "out")
    for tile, _, _ in iterate_tiles(index, ShardReader(str(tmp_path / "out"), index=index), batch_size=1):
        assert np.abs(tile[0].numpy().astype(int) - pixels()).max() < 16  # JPEG is not exact


def test_embedding_counts_them(tiles: Path) -> None:
    data = open_tiles(str(tiles), None, SourceOptions())
    work = DecodeRange(data, lambda tiles_BHWC: tiles_BHWC.float())
    out = torch.empty((5, 32, 32, 3), dtype=torch.uint8).numpy()
    assert [work((first, last), out).turned for first, last in ((0, 2), (2, 5), (0, 5))] == [2, 2, 4]


@pytest.mark.parametrize("folder", ["images", "masks"])
def test_a_pair_with_one_that_is_to_be_turned_is_refused(folder: str, tmp_path: Path) -> None:
    write_pairs(tmp_path / "in", ["a"])
    path, exif = tmp_path / "in" / folder / "a.png", Image.Exif()
    exif[274] = 3
    with Image.open(path) as image:
        image.load()
    image.save(path, exif=exif)
    archive = find_pictures("masks", tmp_path / "in", "images", "masks")
    config = PrepareConfig(dataset="masks", source=str(tmp_path / "in"), out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    with pytest.raises(
        InputError, match=rf"{folder}/a\.png: says that it is to be shown turned \(EXIF orientation 3\)"
    ):
        prepare(archive, tmp_path / "in", tmp_path / "out", config)
