"""Read tiles once each, in index order.

Evaluation and embedding use it.

Legend: B tiles of a batch, H, W height and width in pixels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ca2cl.data.loading.order import Integers
from ca2cl.data.loading.stream import BadTile, SampleSource, UndecodableError
from ca2cl.data.loading.workers import Pixels, TileWorkers
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GoodTiles:
    """The samples of a request that decode, as tiles uint8 (B, H, W, 3) in their order, and those that do not."""

    tiles: Tensor
    labels: list[int]
    samples: list[int]
    bad: list[BadTile]


class _Decode:
    """Decodes a list of sample numbers; those that decode fill the first rows."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def rows(self, request: Integers) -> int:
        return len(request)

    def __call__(self, request: Integers, tiles_RHWC: Pixels) -> tuple[list[int], list[int], list[BadTile]]:
        labels: list[int] = []
        samples: list[int] = []
        bad: list[BadTile] = []
        for sample in request.tolist():
            try:
                _, label, _ = self._source.fill(sample, tiles_RHWC[len(samples)])
            except UndecodableError as failure:
                bad.append(failure.tile)
            else:
                labels.append(label)
                samples.append(sample)
        return labels, samples, bad


def read_requests(
    index: ShardIndex, reader: ShardReader, requests: Sequence[Integers], *, workers: int = 0
) -> Generator[tuple[Integers, GoodTiles], None, None]:
    """The tiles of every request, a list of sample numbers, one after another.

    Args:
        requests: none of them empty.
        workers: decoding processes; 0 decodes in this one. Never changes a result.

    Yields:
        The request and its tiles; the memory of a yielded tensor is used again once nothing refers to it.

    Raises:
        InputError: a shard cannot be read.
    """
    source = SampleSource(index, reader)
    most = max((len(request) for request in requests), default=1)
    running = TileWorkers(_Decode(source), most, source.tile_size, workers)
    with contextlib.closing(running.answers(requests)) as answers:
        for request, ((labels, samples, bad), tiles) in zip(requests, answers, strict=True):
            yield request, GoodTiles(tiles[: len(samples)], labels, samples, bad)


def iterate_tiles(
    index: ShardIndex,
    reader: ShardReader,
    samples: Integers | None = None,
    *,
    batch_size: int = 256,
    workers: int = 0,
    on_bad: Callable[[BadTile], None] | None = None,
) -> Generator[tuple[Tensor, Tensor, Tensor], None, None]:
    """Read tiles once each, in the order of ``samples``; samples that do not decode are left out.

    Args:
        index: the shards' index.
        reader: where their bytes come from.
        samples: sample numbers in index order; None takes all. Ascending numbers read the shards sequentially.
        batch_size: most tiles in a batch; a batch has fewer where samples were left out, and none is empty.
        workers: decoding processes; 0 decodes in this one. Never changes a result.
        on_bad: called with each sample that is left out; None logs a warning for it.

    Yields:
        tiles uint8 (B, H, W, 3), labels int64 (B,) with -1 where unlabelled, sample numbers int64 (B,).

    Raises:
        InputError: a shard cannot be read.
    """
    report = on_bad or _warn
    numbers = np.arange(len(index), dtype=np.int64) if samples is None else np.asarray(samples, np.int64)
    requests = [numbers[first : first + batch_size] for first in range(0, len(numbers), batch_size)]
    with contextlib.closing(read_requests(index, reader, requests, workers=workers)) as batches:
        for _, good in batches:
            for tile in good.bad:
                report(tile)
            if good.samples:
                yield good.tiles, torch.tensor(good.labels), torch.tensor(good.samples)


def _warn(tile: BadTile) -> None:
    logger.warning("sample %s left out: %s", tile.key, tile.reason)
