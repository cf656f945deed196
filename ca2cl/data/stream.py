"""Batches of tiles in lane order: what the training loop iterates over.

A map-style dataset answers requests (step, first row, last row), each a pure function of the request, and a DataLoader
answers one endless list of them in order. So the number of workers never changes a batch, workers live through all
epochs, a seek is a first request elsewhere, and memory in flight is bounded by chunks and not by batches. A worker
decodes straight into shared memory; the training process copies a chunk at most once, into the (pinned) batch.

Legend: B this rank's tiles of a batch, H, W height and width in pixels, q samples that a batch takes of a lane.
"""

from __future__ import annotations

import contextlib
import math
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ca2cl.data.decode import BadSample, decode_into
from ca2cl.data.index import ShardIndex, ShardSamples, key_hash
from ca2cl.data.lanes import BatchPlan, LaneOrder
from ca2cl.data.storage import ShardReader
from ca2cl.errors import InputError

_MAX_REPLACEMENTS = 64
"""Undecodable tiles in a row of a lane after which the data, not the tile, is at fault."""


@dataclass(frozen=True)
class BadTile:
    """A sample that could not be decoded, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class TileBatch:
    """One rank's share of the batch of optimizer step ``step`` (counted from 0).

    ``tiles`` uint8 (B, H, W, 3) RGB; ``key_hash`` int64 (B,), from which the views' randomness derives; ``labels``
    int64 (B,), -1 where unlabelled; ``positions`` int64 (B,), rows in the global batch's canonical order; ``keys``
    the B samples' keys; ``bad`` the samples that were met and replaced.
    """

    step: int
    epoch: int
    tiles: Tensor
    key_hash: Tensor
    labels: Tensor
    positions: Tensor
    keys: list[str]
    bad: list[BadTile]


@dataclass(frozen=True)
class BadBudget:
    """Decides from totals over all ranks whether too many samples are bad, so that every rank decides alike.

    The run stops when more than ``max_rate`` of the samples seen so far are bad. Up to ``grace`` samples the share is
    taken of ``grace`` samples, so that one bad tile in a first small batch does not stop a run.
    """

    max_rate: float
    grace: int = 100

    def exceeded(self, bad: int, seen: int) -> bool:
        """Whether ``bad`` of ``seen`` samples are too many."""
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
class Chunk:
    """Rows ``start`` and on of a batch, as a worker hands them over. ``error`` stands instead of an InputError: the
    DataLoader would wrap its one line into a traceback."""

    step: int
    start: int
    epoch: int
    tiles: Tensor
    key_hash: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    keys: list[str]
    bad: list[BadTile]
    error: str | None = None


class SampleSource:
    """Decodes single samples by their number in index order; keeps the index rows of the shards it last used."""

    def __init__(self, index: ShardIndex, reader: ShardReader, shards_kept: int = 256) -> None:
        self._index, self._reader, self._kept = index, reader, shards_kept
        self._shards: OrderedDict[int, ShardSamples] = OrderedDict()
        height, width = index.manifest.tile_size
        self.tile_size = (int(height), int(width))

    def fill(self, sample: int, out_HWC: npt.NDArray[np.uint8]) -> tuple[str, int]:
        """Decode a sample into ``out_HWC``; returns its key and label.

        Raises:
            UndecodableError: it is no tile of the manifest's size.
            InputError: its shard cannot be read.
        """
        shard, row = self._index.locate(sample)
        samples = self._samples(shard)
        key = samples.key[row]
        data = self._reader.read(self._index.shards[shard].name, int(samples.offset[row]), int(samples.size[row]))
        try:
            decode_into(data, out_HWC)
        except BadSample as error:
            raise UndecodableError(BadTile(key, str(error))) from None
        return key, int(samples.label[row])

    def _samples(self, shard: int) -> ShardSamples:
        found = self._shards.get(shard)
        if found is None:
            found = self._shards[shard] = self._index.samples(shard)
            if len(self._shards) > self._kept:
                self._shards.popitem(last=False)
        else:
            self._shards.move_to_end(shard)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # A mapped index cannot be pickled; a spawned worker maps it again.
        return self.__dict__ | {"_index": None, "_root": self._index.root, "_shards": OrderedDict()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        root = state.pop("_root")
        self.__dict__.update(state)
        self._index = ShardIndex(root)


class UndecodableError(Exception):
    """Carries a BadTile from the decoder to whoever replaces or skips it."""

    def __init__(self, tile: BadTile) -> None:
        super().__init__(tile.key, tile.reason)
        self.tile = tile


def empty_tiles(count: int, tile_size: tuple[int, int], *, shared: bool) -> Tensor:
    """An uninitialised uint8 tensor (count, H, W, 3), in shared memory where a worker fills it for its parent."""
    height, width = tile_size
    size = count * height * width * 3
    if not shared:
        return torch.empty((count, height, width, 3), dtype=torch.uint8)
    # As torch's default_collate does: sharing an ordinary tensor afterwards would copy it.
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, height, width, 3)


Request = tuple[int, int, int]


class _ChunkDataset(Dataset[Chunk]):
    """Answers (step, first row, last row + 1) of one rank's batches."""

    def __init__(self, source: SampleSource, order: LaneOrder, rank: int, world: int) -> None:
        self._source, self._order, self._rank, self._world = source, order, rank, world
        self._plan: tuple[int, BatchPlan] | None = None

    def __getitem__(self, request: Request) -> Chunk:
        step, start, stop = request
        plan = self._plan_of(step)
        shared = torch.utils.data.get_worker_info() is not None
        chunk = Chunk(
            step=step,
            start=start,
            epoch=plan.epoch,
            tiles=empty_tiles(stop - start, self._source.tile_size, shared=shared),
            key_hash=np.empty(stop - start, np.int64),
            labels=np.empty(stop - start, np.int64),
            positions=plan.positions[start:stop],
            keys=[],
            bad=[],
        )
        try:
            self._fill(chunk, plan)
        except InputError as error:
            return Chunk(**chunk.__dict__ | {"error": str(error), "tiles": torch.empty(0)})
        return chunk

    def _plan_of(self, step: int) -> BatchPlan:
        if self._plan is None or self._plan[0] != step:
            self._plan = (step, self._order.batch(step, self._rank, self._world))
        return self._plan[1]

    def _fill(self, chunk: Chunk, plan: BatchPlan) -> None:
        tiles_BHWC = chunk.tiles.numpy()
        for row in range(len(tiles_BHWC)):
            sample = int(plan.samples[chunk.start + row])
            try:
                key, label = self._source.fill(sample, tiles_BHWC[row])
            except UndecodableError as failure:
                chunk.bad.append(failure.tile)
                key, label = self._replace(chunk, int(chunk.positions[row]), tiles_BHWC[row])
            chunk.keys.append(key)
            chunk.key_hash[row] = key_hash(key)
            chunk.labels[row] = label

    def _replace(self, chunk: Chunk, position: int, out_HWC: npt.NDArray[np.uint8]) -> tuple[str, int]:
        """Fill a bad sample's row with the first good one of ``replacements``."""
        order = self._order
        lane, j = divmod(position, order.per_lane)
        at = chunk.step % order.steps_per_epoch * order.per_lane + j
        first = len(chunk.bad) - 1
        for place in replacements(at, order.per_lane, order.lane_length):
            try:
                return self._source.fill(order.sample(chunk.epoch, lane, place), out_HWC)
            except UndecodableError as failure:
                chunk.bad.append(failure.tile)
        failed = chunk.bad[first:]
        raise InputError(
            f"sample {failed[0].key}: {failed[0].reason}, and so with the next {len(failed) - 1} tiles of its lane; "
            "the data set is damaged, write it again with `ca2cl shard`"
        )


def replacements(position: int, per_lane: int, lane_length: int) -> Iterator[int]:
    """Lane positions that are tried, in order, for a bad one: its slot in the next batch, the batch after that, ...

    They wrap round the lane; where slots run out, those of the neighbouring sample follow. A pure function, so that
    neither seeking nor the number of processes changes what stands in for a bad sample. At most 64 are tried.
    """
    rounds = math.ceil(lane_length / per_lane)
    tried = {position}
    for nudge in range(per_lane):
        for ahead in range(rounds):
            place = (position + ahead * per_lane + nudge) % lane_length
            if place not in tried:
                yield place
                tried.add(place)
            if len(tried) > _MAX_REPLACEMENTS:
                return


class _Requests(Sampler[Request]):
    """All requests of steps start .. stop, lazily: the list may be a whole run's."""

    def __init__(self, start: int, stop: int, rows: int, chunk: int) -> None:
        self._start, self._stop, self._rows, self._chunk = start, stop, rows, chunk

    def __iter__(self) -> Iterator[Request]:
        for step in range(self._start, self._stop):
            for first in range(0, self._rows, self._chunk):
                yield step, first, min(first + self._chunk, self._rows)

    def __len__(self) -> int:
        return (self._stop - self._start) * -(-self._rows // self._chunk)


def answers(dataset: Dataset[Any], requests: Any, workers: int, prefetch: int = 2) -> Generator[Any, None, None]:
    """The dataset's items for ``requests``, in order, each as the dataset made it (nothing is stacked or copied).

    torch's workers compute with one intra-op thread and end when their parent does. Here they also end with this
    generator: an iterator that an exception's traceback keeps alive would otherwise be shut down by the garbage
    collector, in whatever thread or forked child that happens to run.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=workers,
        collate_fn=_as_is,
        prefetch_factor=prefetch if workers else None,
    )
    items = iter(loader)
    try:
        yield from items
    finally:
        shut_down = getattr(items, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


def _as_is(item: Any) -> Any:
    return item


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
        pin: page-locked batches, for asynchronous copies to a GPU; None pins where CUDA is available.

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
        self._start, self._stop, self._workers, self._chunk = start_step, stop_step, workers, chunk
        self._rows = order.batch_size // world
        self._pin = torch.cuda.is_available() if pin is None else pin
        source = SampleSource(index, reader, shards_kept=2 * order.lanes // world + 64)
        self._tile_size = source.tile_size
        self._dataset = _ChunkDataset(source, order, rank, world)

    def __len__(self) -> int:
        """Number of steps."""
        return self._stop - self._start

    def __iter__(self) -> Generator[TileBatch, None, None]:
        requests = _Requests(self._start, self._stop, self._rows, self._chunk)
        with contextlib.closing(answers(self._dataset, requests, self._workers)) as chunks:
            for _ in range(self._start, self._stop):
                yield self._assemble(chunks)

    def _assemble(self, chunks: Iterator[Chunk]) -> TileBatch:
        pieces: list[Chunk] = []
        tiles: Tensor | None = None
        for first in range(0, self._rows, self._chunk):
            piece = next(chunks)
            if piece.error is not None:
                raise InputError(piece.error)
            pieces.append(piece)
            if len(piece.tiles) == self._rows and not self._pin:
                tiles = piece.tiles
                break
            if tiles is None:
                tiles = torch.empty((self._rows, *self._tile_size, 3), dtype=torch.uint8, pin_memory=self._pin)
            tiles[first : first + len(piece.tiles)] = piece.tiles
        assert tiles is not None
        return TileBatch(
            step=pieces[0].step,
            epoch=pieces[0].epoch,
            tiles=tiles,
            key_hash=torch.from_numpy(np.concatenate([p.key_hash for p in pieces])),
            labels=torch.from_numpy(np.concatenate([p.labels for p in pieces])),
            positions=torch.from_numpy(np.concatenate([p.positions for p in pieces])),
            keys=[key for p in pieces for key in p.keys],
            bad=[tile for p in pieces for tile in p.bad],
        )
