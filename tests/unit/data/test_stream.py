"""Batches are the same for any number of workers and processes; bad samples are replaced; broken shards are clear."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.data.loading.order import LaneOrder, replacements
from ca2cl.data.loading.stream import BadBudget, BadTile, LaneStream, SampleSource, TileBatch
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex, key_hash, slide_hash
from ca2cl.errors import InputError
from tests.support.jobs import ROOT
from tests.support.shards import encode, random_tiles, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
TILES = random_tiles(60)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("data") / "good", [encode(tile) for tile in TILES])


@pytest.fixture(scope="module")
def bad_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples 3, 17 and 40 are undecodable, of another size, and truncated."""
    encoded = [encode(tile) for tile in TILES]
    encoded[3], encoded[17], encoded[40] = b"no image", encode(random_tiles(1, side=8)[0]), encoded[40][:200]
    return write_shards(tmp_path_factory.mktemp("data") / "bad", encoded)


def stream(
    root: Path, *, lanes: int = 4, batch: int = 8, start: int = 0, stop: int = 9, workers: int = 0, rank: int = 0,
    world: int = 1, chunk: int = 128, seed: int = 5,
) -> list[TileBatch]:  # fmt: skip
    index = ShardIndex(root)
    order = LaneOrder(index, lanes, batch, seed)
    found = LaneStream(
        index, order, ShardReader(root, index=index), rank=rank, world=world, workers=workers, start_step=start,
        stop_step=stop, chunk=chunk,
    )  # fmt: skip
    assert len(found) == stop - start
    return list(found)


def assert_equal(left: Sequence[TileBatch], right: Sequence[TileBatch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert (a.step, a.epoch, a.keys, a.bad) == (b.step, b.epoch, b.keys, b.bad)
        for name in ("tiles", "key_hash", "labels", "positions", "slides"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_batches_hold_the_samples_of_the_order(shards: Path) -> None:
    order = LaneOrder(ShardIndex(shards), 4, 8, 5)
    batches = stream(shards, stop=2 * order.steps_per_epoch)
    for step, batch in enumerate(batches):
        plan = order.batch(step)
        assert (batch.step, batch.epoch) == (step, plan.epoch)
        assert np.array_equal(batch.tiles.numpy(), TILES[plan.samples])
        assert batch.keys == [f"t{i:06d}" for i in plan.samples]
        assert batch.labels.tolist() == [i % 3 for i in plan.samples]
        assert batch.key_hash.tolist() == [key_hash(key) for key in batch.keys]
        assert batch.positions.tolist() == list(range(8)) and batch.bad == []
        assert batch.tiles.dtype == torch.uint8 and batch.key_hash.dtype == batch.labels.dtype == torch.int64


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_and_chunks_never_change_a_batch(bad_shards: Path, workers: int) -> None:
    expected = stream(bad_shards)
    assert any(batch.bad for batch in expected)
    assert_equal(stream(bad_shards, workers=workers, chunk=3), expected)
    assert_equal(stream(bad_shards, workers=workers, chunk=8), expected)


@pytest.mark.parametrize("start", [1, 7, 8])
def test_starting_anywhere_equals_going_there(bad_shards: Path, start: int) -> None:
    assert_equal(stream(bad_shards, start=start), stream(bad_shards)[start:])


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_the_single_process(bad_shards: Path, world: int) -> None:
    whole = stream(bad_shards)
    ranks = [stream(bad_shards, rank=rank, world=world, chunk=2) for rank in range(world)]
    for step, expected in enumerate(whole):
        rows = torch.empty_like(expected.tiles)
        keys = [""] * 8
        for batches in ranks:
            rows[batches[step].positions] = batches[step].tiles
            for position, key in zip(batches[step].positions.tolist(), batches[step].keys, strict=True):
                keys[position] = key
        assert torch.equal(rows, expected.tiles) and keys == expected.keys
        bad = [tile.key for batches in ranks for tile in batches[step].bad]
        assert sorted(bad) == sorted(tile.key for tile in expected.bad)


def test_bad_samples_are_replaced_by_their_slot_in_the_next_batch(bad_shards: Path) -> None:
    order = LaneOrder(ShardIndex(bad_shards), 4, 8, 5)
    reasons = {"t000003": "does not decode", "t000017": "8 x 8 pixels, expected 16 x 16", "t000040": "does not decode"}
    seen = 0
    for step, batch in enumerate(stream(bad_shards, stop=14)):
        plan = order.batch(step)
        for row, sample in enumerate(plan.samples.tolist()):
            if sample not in (3, 17, 40):
                assert batch.keys[row] == f"t{sample:06d}"
                continue
            seen += 1
            lane, j = divmod(row, 2)
            at = step % 7 * 2 + j
            while sample in (3, 17, 40):
                at = (at + 2) % order.lane_length
                sample = order.sample(plan.epoch, lane, at)
            assert batch.keys[row] == f"t{sample:06d}"
            assert np.array_equal(batch.tiles[row].numpy(), TILES[sample])
        for tile in batch.bad:
            assert reasons[tile.key] in tile.reason
    assert seen >= 4


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 6), st.integers(1, 40), st.data())
def test_replacements_visit_the_lane_starting_with_the_next_batches(q: int, length: int, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, length - 1))
    places = list(replacements(position, q, length))
    assert sorted(places) == [p for p in range(length) if p != position]
    if position + q < length:
        assert places[0] == position + q
    assert len(list(replacements(0, q, 10**9))) == 64


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_never_decodes_is_one_clear_line(tmp_path: Path, workers: int) -> None:
    root = write_shards(tmp_path / "broken", [b"no image"] * 40)
    with pytest.raises(
        InputError, match=r"sample t0000\d\d: .*next 9 tiles of its lane; the data set is damaged"
    ) as got:
        stream(root, stop=1, workers=workers)
    assert "\n" not in str(got.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_shard_that_breaks_under_way_is_one_clear_line(tmp_path: Path, workers: int, damage: str) -> None:
    root = write_shards(tmp_path / "s", [encode(tile) for tile in TILES])
    index = ShardIndex(root)
    reader = ShardReader(root, index=index)
    broken = root / "shard-000002.tar"
    if damage == "missing":
        broken.unlink()
    else:
        os.truncate(broken, 600)
    with pytest.raises(InputError, match=r"shard-000002.tar: (600 bytes|cannot be read)") as got:
        list(LaneStream(index, LaneOrder(index, 4, 8, 5), reader, workers=workers, stop_step=7))
    assert "\n" not in str(got.value)


def test_budget_is_a_pure_share_with_grace_for_the_first_samples() -> None:
    budget = BadBudget(0.01)
    assert not budget.exceeded(1, 8) and budget.exceeded(2, 8)
    assert not budget.exceeded(10, 1000) and budget.exceeded(11, 1000)
    assert BadBudget(0.0).exceeded(1, 8) and not BadBudget(1.0).exceeded(500, 500)
    budget.check(1, 100)
    with pytest.raises(InputError, match="11 of 1000 .*slide7: too small.*--data.max_bad_rate"):
        budget.check(11, 1000, [BadTile("slide7", "too small")])


def test_source_survives_pickling(shards: Path) -> None:
    index = ShardIndex(shards)
    source = SampleSource(index, ShardReader(shards, index=index))
    again = pickle.loads(pickle.dumps(source))  # noqa: S301 - our own bytes
    for one in (source, again):
        out = np.empty((16, 16, 3), np.uint8)
        assert one.fill(42, out) == ("t000042", 0, slide_hash(None, "t000042")) and np.array_equal(out, TILES[42])


def workers_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone_within(pids: list[int], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(alive(pid) for pid in pids)


def test_workers_end_with_the_iterator(shards: Path) -> None:
    index = ShardIndex(shards)
    before = set(workers_of(os.getpid()))
    batches = iter(LaneStream(index, LaneOrder(index, 4, 8, 5), ShardReader(shards), workers=2, stop_step=10**6))
    next(batches)
    started = [pid for pid in workers_of(os.getpid()) if pid not in before]
    assert len(started) >= 2
    batches.close()
    assert gone_within(started, 60)


SCRIPT = """
import sys, time
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.loading.stream import LaneStream
index = ShardIndex(sys.argv[1])
stream = LaneStream(index, LaneOrder(index, 4, 8, 5), ShardReader(sys.argv[1]), workers=2, stop_step=10**6)
batches = iter(stream)
next(batches)
sys.stdout.write("ready\\n")
sys.stdout.flush()
time.sleep(60)
"""


def test_workers_end_with_a_killed_parent(shards: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT, str(shards)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
    started = workers_of(parent.pid)
    assert len(started) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone_within(started, 60)
