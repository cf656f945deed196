"""Micro-batches: their rows, and that views are made once where there is room to keep them."""

import gc
import weakref
from typing import Any

import pytest
import torch

from ca2cl.data.loading.stream import TileBatch
from ca2cl.methods.base import Tiles, ViewBatch
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.pretrain.batches import Copies, MicroBatches

ROWS, SIDE = 8, 4
BYTES = 2 * 2 * SIDE * SIDE * 3 * 4  # two views of two rows in fp32


class Views:
    """Both views are the tile itself; notes which rows were asked for."""

    def __init__(self) -> None:
        self.made: list[list[int]] = []

    def __call__(self, tiles: Tiles) -> ViewBatch:
        self.made.append(tiles.positions.tolist())
        assert tiles.pixels[:, 0, 0, 0].tolist() == tiles.positions.tolist() == tiles.keys.tolist()
        x = tiles.pixels.permute(0, 3, 1, 2).float()
        return ViewBatch(x, x + 1, tiles.positions, tiles.second_order)


def batch() -> TileBatch:
    rows = torch.arange(ROWS)
    tiles = rows.to(torch.uint8)[:, None, None, None].expand(ROWS, SIDE, SIDE, 3).contiguous()
    return TileBatch(0, 0, tiles, rows, rows, rows, rows, [str(row) for row in range(ROWS)], [])


@pytest.mark.parametrize(("room", "kept"), [(1 << 20, 4), (BYTES * 2 + BYTES // 2, 2), (0, 0)])
def test_views_are_made_once_where_there_is_room(room: int, kept: int) -> None:
    views = Views()
    micro_batches = MicroBatches(batch(), views, torch.device("cpu"), 2, kept_bytes=room)
    assert len(micro_batches) == 4
    first, again = ([micro_batches[number] for number in range(4)] for _ in range(2))
    assert all(torch.equal(a.x2, b.x2) for a, b in zip(first, again, strict=True))
    assert views.made[:4] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(views.made) == 8 - kept
    with pytest.raises(IndexError):
        micro_batches[4]


def test_the_views_of_a_batch_that_is_one_micro_batch_are_not_kept() -> None:
    """A step asks for them once, and they would lie in memory beside its activations."""
    views = Views()
    micro_batches = MicroBatches(batch(), views, torch.device("cpu"), ROWS)
    micro_batches.prefetch()  # nothing on a CPU
    assert micro_batches[0] is not micro_batches[0] and len(views.made) == 2


class Event:
    """A mark in a stream's work, as CUDA has them."""

    def __init__(self) -> None:
        self.done = False

    def query(self) -> bool:
        return self.done


def test_tiles_are_kept_until_their_copy_to_the_gpu_is_done() -> None:
    copies: Any = Copies()
    events = [Event() for _ in range(4)]
    tiles = [torch.zeros(1) for _ in events]
    alive = [weakref.ref(one) for one in tiles]
    copies.add(tiles.pop(0), events[0])
    copies.add(tiles.pop(0), events[1])
    gc.collect()
    assert all(one() is not None for one in alive)
    events[0].done = True
    copies.add(tiles.pop(0), events[2])
    gc.collect()
    assert [one() is not None for one in alive] == [False, True, True, True]
    events[1].done = events[2].done = events[3].done = True
    copies.add(tiles.pop(0), events[3])
    gc.collect()
    assert not any(one() is not None for one in alive)


def test_rows_come_in_the_order_of_groups() -> None:
    groups, views = LaneGroups(4, ROWS, 2, 2), Views()
    order = groups.first_order(torch.arange(ROWS)).tolist()
    assert order != list(range(ROWS))
    micro_batches = MicroBatches(batch(), views, torch.device("cpu"), 4, groups)
    both = [micro_batches[0], micro_batches[1]]
    assert views.made == [order[:4], order[4:]]
    assert all(torch.equal(one.second_order, groups.second_order(4)) for one in both)
