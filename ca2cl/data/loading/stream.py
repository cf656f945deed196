"""Batches of tiles in lane order, for the training loop.

Workers answer requests (step, first row, last row), each a pure function of the request, from one endless list of them,
and the answers come in order. So the number of workers never changes a batch, workers live through all epochs, a seek
is a first request elsewhere. The requests of a batch are decoded into one piece of memory, which is the batch.

Legend: B this rank's tiles of a batch, H, W height and width in pixels, q samples that a batch takes of a lane.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from ca2cl.data.decode import BadSample, decode
from ca2cl.data.loading.order import Integers, LaneOrder
from ca2cl.data.loading.workers import Pixels, TileWorkers
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex, key_hash, slide_hash
from ca2cl.errors import InputError


@dataclass(frozen=True)
class BadTile:
    """A sample that could not be decoded, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class TileBatch:
    """One rank's share of the batch of optimizer step ``step`` (counted from 0).

    ``tiles`` uint8 (B, H, W, 3) RGB; ``key_hash`` int64 (B,), from which the views' randomness derives; ``labels``
    int64 (B,), -1 where unlabelled; ``positions`` int64 (B,), rows in the global batch's canonical order; ``slides``
    int64 (B,), equal for tiles of one slide or patient (``slide_hash``); ``keys`` the B samples' keys; ``bad`` the
    samples that were met and replaced.
    """

    step: int
    epoch: int
    tiles: Tensor
    key_hash: Tensor
    labels: Tensor
    positions: Tensor
    slides: Tensor
    keys: list[str]
    bad: list[BadTile]


@dataclass(frozen=True)
class BadBudget:
    """Limit on bad samples. It takes totals over all ranks, so that every rank decides alike.

    The run stops when more than ``max_rate`` of the samples seen so far are bad. Up to ``grace`` samples the share is
    taken of ``grace`` samples, so that one bad tile in a first small batch does not stop a run.
    """

    max_rate: float
    grace: int = 100

    def exceeded(self, bad: int, seen: int) -> bool:
        """True if ``bad`` of ``seen`` samples are too many."""
        return bad > self.max_rate * max(seen, self.grace)

    def check(self, bad: int, seen: int, examples: Sequence[BadTile] = ()) -> None:
        """Raise where ``exceeded``; ``examples`` are bad tiles to name, the last three are.

        Raises:
            InputError: more than the allowed share is bad.
        """
        if self.exceeded(bad, seen):
            named = "; ".join(f"{tile.key}: {tile.reason}" for tile in examples[-3:])
            raise InputError(
                f"data.max_bad_rate is {self.max_rate}: {bad} of {seen} samples could not be decoded"
                f"{f' ({named})' if named else ''}; repair them, or raise --data.max_bad_rate"
            )


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a batch, without their pixels."""

    key_hash: Integers
    labels: Integers
    positions: Integers
    slides: Integers
    keys: list[str]
    bad: list[BadTile]


class SampleSource:
    """Decodes single samples by their number in index order."""

    def __init__(self, index: ShardIndex, reader: ShardReader) -> None:
        self._index, self._reader = index, reader
        height, width = index.manifest.tile_size
        self.tile_size = (int(height), int(width))

    def fill(self, sample: int, out_HWC: Pixels) -> tuple[str, int, int]:
        """Decode a sample into ``out_HWC``; returns its key, label and slide.

        Raises:
            UndecodableError: it is no tile of the manifest's size.
            InputError: its shard cannot be read.
        """
        shard, row = self._index.locate(sample)
        samples = self._index.samples(shard)
        key = samples.key[row]
        data = self._reader.read(self._index.shards[shard].name, int(samples.offset[row]), int(samples.size[row]))
        try:
            decode(data, out_HWC=out_HWC)
        except BadSample as error:
            raise UndecodableError(BadTile(key, str(error))) from None
        return key, int(samples.label[row]), slide_hash(samples.group[row], key)


class UndecodableError(Exception):
    """Carries a BadTile from the decoder to the code that replaces or skips it."""

    def __init__(self, tile: BadTile) -> None:
        super().__init__(tile.key, tile.reason)
        self.tile = tile


Request = tuple[int, int, int]


class _BatchRows:
    """Decodes rows (step, first, last + 1) of one rank's batches."""

    def __init__(self, source: SampleSource, order: LaneOrder, rank: int, world: int) -> None:
        self._source, self._order = source, order
        self._plan = lru_cache(1)(partial(order.batch, rank=rank, world=world))  # chunks of a step follow one another

    def rows(self, request: Request) -> int:
        _, first, stop = request
        return stop - first

    def __call__(self, request: Request, tiles_RHWC: Pixels) -> _Rows:
        step, first, stop = request
        plan = self._plan(step)
        good: list[tuple[str, int, int]] = []
        bad: list[BadTile] = []
        for row in range(stop - first):
            try:
                found = self._source.fill(int(plan.samples[first + row]), tiles_RHWC[row])
            except UndecodableError as failure:
                position = int(plan.positions[first + row])
                found, failed = self._replace(failure.tile, step, position, tiles_RHWC[row])
                bad += failed
            good.append(found)
        numbers = np.array([(key_hash(key), label, slide) for key, label, slide in good], np.int64).reshape(-1, 3)
        hashes, labels, slides = numbers.T
        return _Rows(hashes, labels, plan.positions[first:stop], slides, [key for key, _, _ in good], bad)

    def _replace(
        self, tile: BadTile, step: int, position: int, out_HWC: Pixels
    ) -> tuple[tuple[str, int, int], list[BadTile]]:
        """Fill a bad sample's row with the first good one of ``replacements``; the list names all bad ones met."""
        failed = [tile]
        for sample in self._order.replacements(step, position):
            try:
                return self._source.fill(sample, out_HWC), failed
            except UndecodableError as failure:
                failed.append(failure.tile)
        raise InputError(
            f"sample {tile.key}: {tile.reason}, and so with the next {len(failed) - 1} tiles of its lane; "
            "the data set is damaged, write it again with `ca2cl shard`"
        )


class LaneStream:
    """Iterable over the TileBatches of steps ``start_step`` .. ``stop_step`` - 1 of one rank, in order.

    Args:
        index: the shards' index.
        order: which samples make up which batch.
        reader: where their bytes come from.
        rank: r, this process.
        world: W, number of processes; divides the lanes.
        workers: decoding processes; 0 decodes in this one. Never changes a batch.
        start_step: first optimizer step; any step costs the same to begin at.
        stop_step: one past the last.
        chunk: tiles that a worker decodes in one piece.
        pin: page-locked batches, for asynchronous copies to a GPU; None pins where CUDA is available. Whoever makes
            such a copy keeps the batch's tiles until it is done.

    Raises:
        InputError: at construction, W does not divide the lanes; while iterating, a shard cannot be read, or no
            replacement is found for a bad sample. The message is one line, from whichever worker it came.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: LaneOrder,
        reader: ShardReader,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        start_step: int = 0,
        stop_step: int,
        chunk: int = 128,
        pin: bool | None = None,
    ) -> None:
        order.check_world(world)
        assert 0 <= rank < world and 0 <= start_step <= stop_step and chunk >= 1, (rank, world, start_step, chunk)
        self._start, self._stop, self._chunk = start_step, stop_step, chunk
        self._rows, self._steps_per_epoch = order.batch_size // world, order.steps_per_epoch
        index.keep(order.shards_open(world))
        source = SampleSource(index, reader)
        work = _BatchRows(source, order, rank, world)
        self._workers = TileWorkers(
            work, self._rows, source.tile_size, workers, requests=-(-self._rows // chunk),
            pin=torch.cuda.is_available() if pin is None else pin,
        )  # fmt: skip

    def __len__(self) -> int:
        """Number of steps."""
        return self._stop - self._start

    def __iter__(self) -> Generator[TileBatch, None, None]:
        requests = (
            [(step, first, min(first + self._chunk, self._rows)) for first in range(0, self._rows, self._chunk)]
            for step in range(self._start, self._stop)
        )
        with contextlib.closing(self._workers.batches(requests)) as batches:
            for step in range(self._start, self._stop):
                yield self._assemble(step, *next(batches))

    def _assemble(self, step: int, parts: list[_Rows], tiles: Tensor) -> TileBatch:
        return TileBatch(
            step=step,
            epoch=step // self._steps_per_epoch,
            tiles=tiles,
            key_hash=torch.from_numpy(np.concatenate([part.key_hash for part in parts])),
            labels=torch.from_numpy(np.concatenate([part.labels for part in parts])),
            positions=torch.from_numpy(np.concatenate([part.positions for part in parts])),
            slides=torch.from_numpy(np.concatenate([part.slides for part in parts])),
            keys=[key for part in parts for key in part.keys],
            bad=[tile for part in parts for tile in part.bad],
        )
