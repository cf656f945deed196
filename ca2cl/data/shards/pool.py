"""Process pool that writes shards, each once over all runs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ca2cl.common.files import file_digest
from ca2cl.data.shards.index import ShardInfo
from ca2cl.data.shards.writer import Packing, pack, read_sidecar, write_sidecar
from ca2cl.data.sources.base import Tile, TileReader
from ca2cl.errors import InputError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers

PLAN_FOLDER = ".plan"


@dataclass(frozen=True)
class ShardTask:
    """One shard to write, or to find written."""

    out: str
    shard: int
    tiles: list[Tile]
    reader: TileReader
    packing: Packing


def sidecar_path(out: Path, name: str) -> Path:
    return out / PLAN_FOLDER / f"{name}.json"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def make_shard(task: ShardTask) -> ShardInfo:
    """Write one shard, unless a run before this one finished it."""
    path = Path(task.out) / shard_name(task.shard)
    sidecar = sidecar_path(Path(task.out), path.name)
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = read_sidecar(sidecar)
        info = known.info
        wanted = not known.skipped or task.packing.bad == "skip"
        if wanted and path.stat().st_size == info.bytes and file_digest(path) == info.sha256:
            return info
    packed = pack(path, task.tiles, task.reader, task.packing)
    write_sidecar(sidecar, packed)
    return packed.info


def write_shards(tasks: Iterable[ShardTask], workers: int) -> Iterator[tuple[int, ShardInfo]]:
    """Run the tasks; yields shard numbers and infos in order of completion.

    Raises:
        InputError: from a task, or because a process was killed; tasks not yet started are dropped.
    """
    if workers == 1 or not processes_can_share():
        for task in tasks:
            yield task.shard, make_shard(task)
        return
    # spawned: a forked child would inherit the threads' locks of whatever the caller has loaded
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=begin_worker)
    pending: dict[Future[ShardInfo], int] = {}
    try:
        for task in tasks:
            with starting_workers():  # the pool's first task does
                pending[pool.submit(make_shard, task)] = task.shard
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
