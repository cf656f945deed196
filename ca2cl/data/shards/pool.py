"""Write shards by several processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from ca2cl.data.shards.samples import ShardInfo
from ca2cl.data.shards.writer import Packing, make_shard, shard_path
from ca2cl.data.sources.base import Tile, TileReader
from ca2cl.runtime.pool import process_pool


def write_shards(
    out: Path, shards: Iterable[list[Tile]], count: int, reader: TileReader, packing: Packing, workers: int
) -> Iterator[tuple[int, ShardInfo]]:
    """Write shards of these tiles; yields shard numbers and infos in order of completion.

    Args:
        out: folder.
        shards: the tiles of each shard.
        count: number of shards.
        reader: reads them.
        packing: checks and encoding.
        workers: writing processes, two or more. This one is the first: another one costs as much as some hundred tiles.

    Raises:
        InputError: from a task, or because a process was killed; tasks not yet started are dropped.
    """
    tasks = ((shard_path(out, number), tiles, reader, packing) for number, tiles in enumerate(shards))
    others = workers - 1
    pending: dict[Future[ShardInfo], int] = {}
    with process_pool(others) as pool:
        for number, task in enumerate(tasks):
            # a second one waits for each of the others, which would idle while this process writes; not at the end
            most = 2 * others if count - number > 2 * workers else others
            if len(pending) < most:
                pending[pool.submit(make_shard, *task)] = number
            else:
                yield number, make_shard(*task)
                yield from _collect(pending, timeout=0)
        while pending:
            yield from _collect(pending)


def _collect(pending: dict[Future[ShardInfo], int], timeout: float | None = None) -> Iterator[tuple[int, ShardInfo]]:
    for future in wait(pending, timeout, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()
