"""The order of ``data.max_per_slide``: its limit, and what it has in common with lanes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ca2cl.data.loading.order import MAX_REPLACEMENTS
from ca2cl.data.loading.slide_order import SlideOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex, slide_hash
from ca2cl.errors import InputError
from tests.support.shards import encode, random_tiles, write_shards
from tests.unit.data.test_lanes import words

Slides = list[int | None]


def index_of(slides: Slides, per_shard: int = 5) -> Any:
    """An index whose samples are of these slides, None for those without one."""
    starts = np.append(np.arange(0, len(slides), per_shard), len(slides)).astype(np.int64)
    names = list(dict.fromkeys(s for s in slides if s is not None))
    numbers = np.array([-1 if s is None else names.index(s) for s in slides], np.int32)
    return SimpleNamespace(starts=starts, slides=lambda: (numbers.copy(), len(names)))


def oracle(slides: Slides, batch: int, seed: int, most: int, epoch: int, per_shard: int = 5) -> list[list[int]]:
    """The batches of an epoch, as slow loops from docs/mathematics.md, "Few tiles of a slide in a batch"."""
    names = list(dict.fromkeys(s for s in slides if s is not None))
    shards = sorted({i // per_shard for i, s in enumerate(slides) if s is None})
    members = [[i for i, s in enumerate(slides) if s == name] for name in names]
    members += [[i for i, s in enumerate(slides) if s is None and i // per_shard == shard] for shard in shards]

    def kept(steps: int) -> list[int]:
        return [min(len(m), most * steps) if k < len(names) else len(m) for k, m in enumerate(members)]

    steps = max(t for t in range(len(slides) // batch + 1) if sum(kept(t)) >= t * batch)
    counts = kept(steps)
    present = [k for k, count in enumerate(counts) if count]
    order_words = words(seed, epoch, 0, len(present))
    sequence = []
    for place in sorted(range(len(present)), key=lambda p: (order_words[p], p)):
        k = present[place]
        m, c = len(members[k]), counts[k]
        turns = [rank + epoch % m for rank in range(m)]
        chosen = [i for i, turn in zip(members[k], turns, strict=True) if (turn + 1) * c // m > turn * c // m]
        assert len(chosen) == c
        own = words(seed, epoch, k + 1, c)
        sequence += [chosen[r] for r in sorted(range(c), key=lambda r: (own[r], r))]
    return [[sequence[row * steps + t] for row in range(batch)] for t in range(steps)]


SHAPES = st.tuples(
    st.lists(st.one_of(st.none(), st.integers(0, 6), st.just(0)), min_size=4, max_size=60), st.sampled_from([1, 2, 4]),
    st.integers(1, 3), st.integers(0, 2**31 - 1), st.integers(1, 4), st.integers(0, 7),
)  # fmt: skip


def made(shape: tuple[Slides, int, int, int, int, int]) -> SlideOrder:
    slides, lanes, q, seed, most, _ = shape
    try:
        return SlideOrder(index_of(slides), lanes, lanes * q, seed, most)
    except InputError:
        assume(False)
        raise


@settings(deadline=None, max_examples=100)
@given(SHAPES)
def test_order_equals_the_slow_loop_and_obeys_the_limit(shape: tuple[Slides, int, int, int, int, int]) -> None:
    slides, lanes, q, seed, most, epoch = shape
    order = made(shape)
    expected = oracle(slides, lanes * q, seed, most, epoch)
    assert order.steps_per_epoch == len(expected)
    seen: list[int] = []
    for within, batch in enumerate(expected):
        plan = order.batch(epoch * order.steps_per_epoch + within)
        assert plan.samples.tolist() == batch and plan.positions.tolist() == list(range(lanes * q))
        counts = Counter(slides[i] for i in batch if slides[i] is not None)
        assert max(counts.values(), default=0) <= most
        seen += batch
    assert len(set(seen)) == len(seen)
    for lane in range(lanes):
        rows = [expected[p // q][lane * q + p % q] for p in range(order.lane_length)]
        assert [order.sample(epoch, lane, p) for p in range(order.lane_length)] == rows


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 40))
def test_batches_depend_neither_on_processes_nor_on_where_one_starts(
    shape: tuple[Slides, int, int, int, int, int], step: int
) -> None:
    walked = made(shape)
    for earlier in range(step):
        walked.batch(earlier)
    whole = walked.batch(step)
    lanes = shape[1]
    for world in (w for w in (1, 2, 4) if lanes % w == 0):
        rows = np.full(len(whole.samples), -1)
        for rank in range(world):
            plan = made(shape).batch(step, rank, world)
            rows[plan.positions] = plan.samples
        assert rows.tolist() == whole.samples.tolist()


def test_a_slides_tiles_are_spread_and_those_left_out_take_turns() -> None:
    """Slide 0 has half of all tiles; of it, 2 a batch take part."""
    slides: Slides = [0 if i % 2 else 1 + i // 2 % 8 for i in range(192)] + [0] * 4
    order = SlideOrder(index_of(slides), 2, 8, 3, 2)
    assert (order.steps_per_epoch, order.limited) == (16, 1)  # 2 T + 96 = 8 T
    seen: Counter[int] = Counter()
    for epoch in range(4):
        one: Counter[int] = Counter()
        for step in range(16):
            batch = order.batch(epoch * 16 + step).samples.tolist()
            counts = Counter(slides[i] for i in batch)
            assert counts[0] == 2 and max(counts.values()) <= 2
            one.update(batch)
        assert {*one.values()} == {1} and sum(one[i] for i in range(196) if slides[i] == 0) == 32
        seen.update(one)
    assert all(1 <= seen[i] <= 2 for i in range(196) if slides[i] == 0)  # 32 of 100: each once at least in four epochs
    assert order.batch(5).samples.tolist() != order.batch(16 + 5).samples.tolist()


def test_order_is_frozen() -> None:
    """Recorded once: a change here breaks the resuming of every run that exists."""
    order = SlideOrder(index_of([0, 1, 2, None] * 6), 2, 4, 11, 2)
    assert [order.batch(step).samples.tolist() for step in (0, 8)] == FROZEN


FROZEN = [[11, 16, 6, 13], [5, 20, 19, 2]]


def test_what_slides_do_not_allow_is_refused_with_a_remedy() -> None:
    with pytest.raises(InputError, match="no tile of data.shards has a slide.*--group_pattern"):
        SlideOrder(index_of([None] * 20), 2, 4, 0, 2)
    with pytest.raises(InputError, match=r"3 slides with at most 2 tiles each give 6 of .*--data.max_per_slide 3"):
        SlideOrder(index_of([0, 1, 2] * 10), 2, 8, 0, 2)
    assert SlideOrder(index_of([0, 1, 2] * 10), 2, 8, 0, 3).steps_per_epoch == 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of 20, 12 and 8 tiles, and 8 tiles of one slide each or of none; every seventh tile is undecodable."""
    names = ["a"] * 20 + ["b"] * 12 + ["c"] * 8 + ["d", "e", None, None, "f", "g", None, "h"]
    drawn = np.random.default_rng(0).permutation(len(names))
    encoded = [encode(tile) for tile in random_tiles(len(names))]
    for bad in range(0, len(names), 7):
        encoded[bad] = b"no image"
    return write_shards(tmp_path_factory.mktemp("data") / "s", encoded, groups=[names[i] for i in drawn], per_shard=10)


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (1, 2)])
def test_the_stream_has_the_slides_and_replaces_bad_tiles_within_the_limit(
    shards: Path, world: int, workers: int
) -> None:
    index = ShardIndex(shards)
    order, groups = SlideOrder(index, 4, 8, 5, 3), index.groups()
    slide_of = {f"t{i:06d}": slide_hash(group, f"t{i:06d}") for i, group in enumerate(groups)}
    found: dict[int, list[int]] = {}
    stop, bad = 2 * order.steps_per_epoch, 0
    for rank in range(world):
        stream = LaneStream(
            index, order, ShardReader(shards, index=index), rank=rank, world=world, workers=workers, stop_step=stop
        )
        for batch in stream:
            assert batch.slides.tolist() == [slide_of[key] for key in batch.keys]
            found.setdefault(batch.step, []).extend(batch.slides.tolist())
            bad += len(batch.bad)
    assert bad and len(found) == stop
    named = {slide_hash(name, "") for name in groups if name is not None}
    for slides in found.values():
        assert len(slides) == 8
        assert all(count <= 3 for slide, count in Counter(slides).items() if slide in named)


def test_replacements_are_of_the_slide_and_then_of_the_rows_own_run() -> None:
    slides: Slides = [0] * 6 + [*range(1, 19)]
    order = SlideOrder(index_of(slides), 2, 4, 1, 6)
    for step in range(order.steps_per_epoch):
        plan = order.batch(step)
        for row, sample in enumerate(plan.samples.tolist()):
            tried = list(order.replacements(step, row))
            assert sample not in tried and len(tried) == len(set(tried)) <= MAX_REPLACEMENTS
            own = [i for i in range(24) if slides[i] == slides[sample]]
            assert {*tried[: len(own) - 1]} == {*own} - {sample}
            run = {order.batch(t).samples.tolist()[row] for t in range(order.steps_per_epoch)}
            assert {*tried} - {*own} <= run | {*range(6)}
