"""Process pool that writes shards, each once over all runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from pathlib import Path

from ca2cl.common.files import file_digest
from ca2cl.data.shards.samples import ShardInfo
from ca2cl.data.shards.writer import Packing, pack, read_sidecar, write_sidecar
from ca2cl.data.sources.base import Tile, TileReader
from ca2cl.errors import InputError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers

PLAN_FOLDER = ".plan"


def sidecar_path(out: Path, name: str) -> Path:
    return out / PLAN_FOLDER / f"{name}.json"


def make_shard(path: Path, tiles: list[Tile], reader: TileReader, packing: Packing) -> ShardInfo:
    """Write one shard, unless an earlier run finished it.

    Args:
        path: of the tar.
        tiles: in order.
        reader: reads them.
        packing: checks and encoding.
    """
    sidecar = sidecar_path(path.parent, path.name)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = read_sidecar(sidecar)
        info = known.info
        wanted = not known.skipped or packing.config.bad == "skip"
        if wanted and path.stat().st_size == info.bytes and file_digest(path) == info.sha256:
            return info
    packed = pack(path, tiles, reader, packing)
    write_sidecar(sidecar, packed)
    return packed.info


def write_shards(
    out: Path, shards: Iterable[list[Tile]], reader: TileReader, packing: Packing, workers: int
) -> Iterator[tuple[int, ShardInfo]]:
    """Write shards of these tiles; yields shard numbers and infos in order of completion.

    Args:
        out: folder.
        shards: the tiles of each shard.
        reader: reads them.
        packing: checks and encoding.
        workers: processes.

    Raises:
        InputError: from a task, or because a process was killed; tasks not yet started are dropped.
    """
    tasks = ((out / f"shard-{number:06d}.tar", tiles, reader, packing) for number, tiles in enumerate(shards))
    if workers == 1 or not processes_can_share():
        yield from enumerate(make_shard(*task) for task in tasks)
        return
    # spawned: a forked child would inherit the threads' locks of whatever the caller has loaded
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
    pending: dict[Future[ShardInfo], int] = {}
    try:
        for number, task in enumerate(tasks):
            with starting_workers():  # the pool's first task does
                pending[pool.submit(make_shard, *task)] = number
            if len(pending) >= 2 * workers:
                yield from _collect(pending)
        while pending:
            yield from _collect(pending)
    except BrokenProcessPool:
        raise InputError("a writing process was killed (out of memory?): use fewer --workers and run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(pending: dict[Future[ShardInfo], int]) -> Iterator[tuple[int, ShardInfo]]:
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        yield pending.pop(future), future.result()
