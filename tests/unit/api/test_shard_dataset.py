"""``ShardDataset`` in a ``DataLoader``."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ca2cl
from ca2cl.errors import InputError
from tests.support.shards import encode, random_tiles, write_shards

TILES = random_tiles(25, 16)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [encode(tile) for tile in TILES])


def test_tiles_labels_and_names(shards: Path) -> None:
    dataset = ca2cl.ShardDataset(shards)
    assert len(dataset) == 25 and dataset.classes == ["a", "b", "c"]
    assert dataset.targets.tolist() == [number % 3 for number in range(25)]
    assert dataset.keys()[3] == "t000003" and dataset.groups() == [None] * 25
    for number in (0, 13, -1):
        tile, label = dataset[number]
        assert tile.dtype == torch.uint8 and label == number % 25 % 3
        np.testing.assert_array_equal(tile.permute(1, 2, 0).numpy(), TILES[number])
    assert list(dataset)[24][1] == 0  # iterating ends by IndexError
    with pytest.raises(IndexError, match="tile 25 of 25"):
        dataset[25]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_the_same(shards: Path, method: str) -> None:
    dataset = ca2cl.ShardDataset(shards, transform=ca2cl.Transform(8, (0.5,) * 3, (0.5,) * 3))
    context = multiprocessing.get_context(method)
    loader = DataLoader(dataset, batch_size=10, num_workers=1, multiprocessing_context=context)
    tiles, labels = zip(*loader, strict=True)
    assert torch.equal(torch.cat(labels), torch.arange(25) % 3)
    assert torch.equal(torch.cat(tiles), torch.stack([dataset[number][0] for number in range(25)]))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        ca2cl.ShardDataset(tmp_path / "nowhere")
    broken = write_shards(tmp_path / "broken", [encode(TILES[0]), b"no image"])
    with pytest.raises(InputError, match="tile t000001: "):
        ca2cl.ShardDataset(broken)[1]
    with pytest.raises(InputError, match="tile t000001: "):
        ca2cl.embed(ca2cl.ShardDataset(broken), "random")
