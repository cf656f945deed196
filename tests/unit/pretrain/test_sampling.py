"""What settings of slides ask of the shards."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ca2cl.config import DataConfig, ObjectiveConfig, RunConfig
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.slide_order import SlideOrder
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.simclr import SimCLR
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.sampling import sample_order
from tests.support.shards import encode, random_tiles, write_shards

TILES = [encode(tile) for tile in random_tiles(40)]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    groups = [None, *(f"slide {i % 7}" for i in range(19)), *["large"] * 20]
    return ShardIndex(write_shards(tmp_path_factory.mktemp("data") / "s", TILES, groups=groups))


def config(weight: float = 1.0, **data: Any) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(lanes=4, **data), objective=ObjectiveConfig(same_slide_weight=weight),
        run=RunConfig(batch_size=8),
    )  # fmt: skip


def test_the_index_knows_slides(index: ShardIndex) -> None:
    numbers, count = index.slides()
    names = index.groups()
    first = list(dict.fromkeys(name for name in names if name is not None))
    assert count == len(first) == 8 and index.has_slides()
    assert numbers.tolist() == [-1 if name is None else first.index(name) for name in names]


def test_the_limit_chooses_the_order_and_says_what_waits(index: ShardIndex, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert type(sample_order(config(0.3), index, 2, SimCLR())) is LaneOrder
        assert not caplog.messages
        order = sample_order(config(max_per_slide=2), index, 2, SimCLR())
    assert isinstance(order, SlideOrder) and order.steps_per_epoch == 3  # 20 + 2 T >= 8 T
    assert caplog.messages == [
        "data.max_per_slide 2: 1 of 8 slides have more than that for each of the 3 steps of an epoch; 16 of 40 tiles "
        "wait for the next epochs"
    ]


def test_shards_without_slides_are_refused(tmp_path: Path) -> None:
    bare = ShardIndex(write_shards(tmp_path / "s", TILES))
    assert bare.slides()[1] == 0 and not bare.has_slides()
    for one, field in (
        (config(0.3), "objective.same_slide_weight is 0.3"),
        (config(max_per_slide=5), "per_slide is 5"),
    ):
        with pytest.raises(InputError, match=f"{field}: no tile of data.shards has a slide or patient.*group_pattern"):
            sample_order(one, bare, 1, SimCLR())


def test_a_cache_that_is_smaller_than_the_shards_is_refused(index: ShardIndex) -> None:
    remote = {"shards": "http://host/shards", "cache_dir": "cache", "max_per_slide": 5}
    with pytest.raises(InputError, match=r"a batch reads from all of 4 shards, .* GB, .*use at least --data.cache_gb"):
        sample_order(config(**remote, cache_gb=1e-6), index, 1, SimCLR())
    assert isinstance(sample_order(config(**remote, cache_gb=1), index, 1, SimCLR()), SlideOrder)
    assert isinstance(sample_order(config(**remote), index, 1, SimCLR()), SlideOrder)


def test_processes_share_the_lanes(index: ShardIndex) -> None:
    with pytest.raises(InputError, match="data.lanes is 4: 3 processes cannot share them"):
        sample_order(config(max_per_slide=5), index, 3, SimCLR())
