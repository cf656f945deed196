"""The order of samples is a pure function of (seed, epoch, position), the same for any number of processes."""

from __future__ import annotations

import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.data.loading.order import LaneOrder
from ca2cl.errors import InputError


def index_of(lengths: list[int]) -> SimpleNamespace:
    return SimpleNamespace(starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def words(seed: int, epoch: int, stream: int, count: int) -> list[int]:
    """Philox's raw words, as the order defines its streams."""
    philox = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, stream, 0], np.uint64))
    return [int(philox.random_raw()) for _ in range(count)]


def oracle_lanes(lengths: list[int], lanes: int, seed: int, epoch: int) -> list[list[int]]:
    """Every lane's samples, written as slow loops from the text of docs/mathematics.md, "Order of samples"."""
    first = [sum(lengths[:i]) for i in range(len(lengths))]
    shard_words = words(seed, epoch, 0, len(lengths))
    sequence = []
    for shard in sorted(range(len(lengths)), key=lambda s: (shard_words[s], s)):
        row_words = words(seed, epoch, shard + 1, lengths[shard])
        sequence += [first[shard] + row for row in sorted(range(lengths[shard]), key=lambda r: (row_words[r], r))]
    length = len(sequence) // lanes
    return [sequence[lane * length : (lane + 1) * length] for lane in range(lanes)]


SHAPES = st.tuples(
    st.lists(st.integers(0, 9), min_size=1, max_size=8), st.sampled_from([1, 2, 4, 8]), st.integers(1, 3),
    st.integers(0, 2**31 - 1), st.integers(0, 5),
).filter(lambda s: sum(s[0]) // s[1] >= s[2])  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(SHAPES)
def test_order_equals_the_slow_loop(shape: tuple[list[int], int, int, int, int]) -> None:
    lengths, lanes, q, seed, epoch = shape
    order = LaneOrder(index_of(lengths), lanes, lanes * q, seed)
    expected = oracle_lanes(lengths, lanes, seed, epoch)
    assert order.lane_length == len(expected[0])
    for lane in range(lanes):
        assert [order.sample(epoch, lane, p) for p in range(order.lane_length)] == expected[lane]
    for within in range(order.steps_per_epoch):
        plan = order.batch(epoch * order.steps_per_epoch + within)
        rows = [expected[lane][within * q + j] for lane in range(lanes) for j in range(q)]
        assert plan.epoch == epoch and plan.samples.tolist() == rows
        assert plan.positions.tolist() == list(range(lanes * q))


@settings(deadline=None, max_examples=80)
@given(SHAPES)
def test_an_epoch_covers_all_but_the_dropped_tail_without_repeats(
    shape: tuple[list[int], int, int, int, int],
) -> None:
    lengths, lanes, q, seed, epoch = shape
    order = LaneOrder(index_of(lengths), lanes, lanes * q, seed)
    steps = order.steps_per_epoch
    seen = np.concatenate([order.batch(step).samples for step in range(epoch * steps, (epoch + 1) * steps)])
    assert len(set(seen.tolist())) == len(seen) == steps * lanes * q
    assert seen.min() >= 0 and seen.max() < sum(lengths)
    assert sum(lengths) - len(seen) < lanes * q + lanes


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 40))
def test_batches_do_not_depend_on_the_number_of_processes(
    shape: tuple[list[int], int, int, int, int], step: int
) -> None:
    lengths, lanes, q, seed, _ = shape
    whole = LaneOrder(index_of(lengths), lanes, lanes * q, seed).batch(step)
    for world in (w for w in (1, 2, 4) if lanes % w == 0):
        rows = np.full(lanes * q, -1)
        for rank in range(world):
            plan = LaneOrder(index_of(lengths), lanes, lanes * q, seed).batch(step, rank, world)
            assert len(plan.samples) == lanes * q // world and plan.epoch == whole.epoch
            assert set((plan.positions // q % world).tolist()) == {rank}
            assert (np.diff(plan.positions) > 0).all()
            rows[plan.positions] = plan.samples
        assert rows.tolist() == whole.samples.tolist()


def test_seeking_equals_going_through() -> None:
    make = lambda: LaneOrder(index_of([7, 30, 5, 11, 20]), 4, 8, 3)  # noqa: E731
    walked = make()
    going = [walked.batch(step).samples.tolist() for step in range(60)]
    for step in (59, 0, 31, 8, 9):
        assert make().batch(step).samples.tolist() == going[step]


def test_epochs_and_seeds_differ() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = LaneOrder(index_of([50] * 6), 4, 8, seed)
        return [int(s) for step in range(37) for s in order.batch(number * 37 + step).samples]

    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1, 2)}) == 6


def test_order_is_frozen() -> None:
    """Recorded once: a change here breaks the resuming of every run that exists."""
    order = LaneOrder(index_of([5, 4, 6, 3]), 2, 4, 11)
    got = [order.batch(step).samples.tolist() for step in (0, 5)]
    assert got == FROZEN, got


FROZEN = [[3, 2, 14, 10], [16, 6, 4, 12]]


def test_seek_in_a_hundred_million_samples_walks_nowhere_and_is_small() -> None:
    """``benchmarks.resume`` has the seconds. Here the calls are counted: a walk would make one a step, a million."""
    index, calls = index_of([1000] * 100_000), [0]

    def count(*_: object) -> None:
        calls[0] += 1

    tracemalloc.start()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        order = LaneOrder(index, 64, 64, 0)
        plan = order.batch(10**6, rank=3, world=8)
    finally:
        sys.setprofile(before)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert plan.epoch == 0 and len(plan.samples) == 8
    assert calls[0] < 2000 and peak < 100e6, (calls, peak)


def test_impossible_splits_are_refused_with_the_arithmetic() -> None:
    index = index_of([10, 10])
    with pytest.raises(InputError, match="batch_size is 10.*data.lanes = 4.*multiple"):
        LaneOrder(index, 4, 10, 0)
    with pytest.raises(InputError, match="20 tiles are fewer than a batch of 24; use --run.batch_size 20"):
        LaneOrder(index, 4, 24, 0)
    with pytest.raises(
        InputError, match="20 tiles are fewer than a batch of 64; use --run.batch_size 20 with --data.lanes 20"
    ):
        LaneOrder(index, 64, 64, 0)
    with pytest.raises(InputError, match="3 processes.*1, 2 or 4 processes, or use .*batch_size 9 with --data.lanes 3"):
        LaneOrder(index, 4, 8, 0).batch(0, 0, 3)
