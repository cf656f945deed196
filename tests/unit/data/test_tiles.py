"""Sequential reading gives every good tile once, in order, for any number of workers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.loading.stream import BadTile
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from tests.support.shards import encode, random_tiles, write_shards

TILES = random_tiles(37)


def opened(root: Path) -> tuple[ShardIndex, ShardReader]:
    index = ShardIndex(root)
    return index, ShardReader(root, index=index)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "good", [encode(tile) for tile in TILES])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("chosen", [None, [36, 0, 5, 5, 20]])
def test_every_tile_comes_once_in_order(shards: Path, workers: int, chosen: list[int] | None) -> None:
    samples = None if chosen is None else np.array(chosen)
    got = list(iterate_tiles(*opened(shards), samples, batch_size=4, workers=workers))
    expected = list(range(37)) if chosen is None else chosen
    assert [len(tiles) for tiles, _, _ in got[:-1]] == [4] * (len(got) - 1)
    assert torch.cat([numbers for _, _, numbers in got]).tolist() == expected
    assert torch.cat([labels for _, labels, _ in got]).tolist() == [i % 3 for i in expected]
    assert np.array_equal(torch.cat([tiles for tiles, _, _ in got]).numpy(), TILES[expected])


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_samples_are_left_out_and_reported(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    encoded = [encode(tile) for tile in TILES[:12]]
    for number in (1, 4, 5, 6, 7):
        encoded[number] = b"no image"
    root = write_shards(tmp_path / "bad", encoded)
    bad: list[BadTile] = []
    got = list(iterate_tiles(*opened(root), batch_size=4, workers=workers, on_bad=bad.append))
    assert [numbers.tolist() for _, _, numbers in got] == [[0, 2, 3], [8, 9, 10, 11]]
    assert np.array_equal(got[0][0].numpy(), TILES[[0, 2, 3]])
    assert [tile.key for tile in bad] == [f"t{number:06d}" for number in (1, 4, 5, 6, 7)]
    with caplog.at_level(logging.WARNING):
        list(iterate_tiles(*opened(root), batch_size=4))
    assert sum("left out" in record.message for record in caplog.records) == 5


def test_nothing_to_read_gives_nothing(shards: Path) -> None:
    assert list(iterate_tiles(*opened(shards), np.zeros(0, np.int64))) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_shard_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    root = write_shards(tmp_path / "s", [encode(tile) for tile in TILES])
    index, reader = opened(root)
    os.truncate(root / "shard-000001.tar", 700)
    with pytest.raises(InputError, match="shard-000001.tar: 700 bytes") as got:
        list(iterate_tiles(index, reader, batch_size=4, workers=workers))
    assert "\n" not in str(got.value)
