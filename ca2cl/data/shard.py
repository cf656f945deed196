"""``ca2cl shard``: tiles to WebDataset tars, an index and a manifest.

What goes into which shard is fixed by a plan before the first byte is written: a seeded shuffle of the listing, cut
every ``samples_per_shard``. Processes then write shards independently, so the result does not depend on their number,
and a run that was killed takes up the shards that its plan still lacks. Index and manifest come last: a folder without
a manifest is unfinished.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ca2cl.data.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardIndex,
    ShardInfo,
    ShardSamples,
    digest_of,
    write_index,
)
from ca2cl.data.pack import (
    Packing,
    file_sha256,
    image_size,
    pack,
    read_sidecar,
    sync_replace,
    write_atomic,
    write_sidecar,
    writing,
)
from ca2cl.data.sources import Source, SourceOptions, Tile, TileReader, open_source
from ca2cl.errors import InputError

POSITIONAL = ("source", "out")
_PLAN_FOLDER = ".plan"
_LOG_SECONDS = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """Settings of ``ca2cl shard``."""

    source: str
    """Folder of class folders, folder of images, folder written by datasets.save_to_disk, or hf:NAME."""
    out: str
    """Folder for the shards, the index and the manifest."""
    encode: Literal["keep", "jpeg", "webp", "png"] = "keep"
    """keep the tiles' bytes as they come, or re-encode every tile."""
    quality: int = 95
    """Quality of jpeg and webp, 1 to 100."""
    resize: int | None = None
    """Resize every tile to this side in pixels; needs encode other than keep."""
    samples_per_shard: int = 1000
    """Tiles in one shard; the last has what is left."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Writing processes. Never changes a result."""
    seed: int = 0
    """Seed of the shuffle that mixes classes within every shard."""
    unlabelled: bool = False
    """Take no labels from folders or columns."""
    group_pattern: str | None = None
    """Regular expression that finds a tile's slide or patient in its path below the source (its first group if any)."""
    split: str | None = None
    """Split of a Hugging Face dataset; needed where it has several."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset; found by type by default."""
    label_column: str | None = None
    """Label column of a Hugging Face dataset; found by type or name by default."""
    group_column: str | None = None
    """Column of a Hugging Face dataset with the slide or patient."""

    def __post_init__(self) -> None:
        for name, low, high in (("samples_per_shard", 1, None), ("workers", 1, None), ("quality", 1, 100)):
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                raise InputError(f"{name} is {value}: use at least {low}" + (f" and at most {high}" if high else ""))
        if self.resize is not None and (self.resize < 1 or self.encode == "keep"):
            raise InputError(f"resize is {self.resize}: use a positive number and --encode jpeg, webp or png")
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}: use 0 or more")


@dataclass(frozen=True)
class Plan:
    """Which tiles go into which shard: ``order`` (N,) holds row numbers of the source."""

    digest: str
    order: npt.NDArray[np.int64]
    samples_per_shard: int
    packing: Packing

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self.order) // self.samples_per_shard)

    def rows(self, shard: int) -> npt.NDArray[np.int64]:
        """Row numbers in the source of a shard's tiles, in their order in the tar."""
        start = shard * self.samples_per_shard
        return self.order[start : start + self.samples_per_shard]


@dataclass(frozen=True)
class Job:
    """One shard to write, or to find written."""

    out: str
    shard: int
    tiles: list[Tile]


def run(config: ShardConfig) -> int:
    """Shard ``config.source`` into ``config.out``; returns the exit code.

    Raises:
        InputError: bad source, bad tile, or a folder that cannot be written or holds something else.
    """
    started = time.monotonic()
    options = SourceOptions(**{name: getattr(config, name) for name in SourceOptions.__dataclass_fields__})
    source = open_source(config.source, options)
    out = Path(config.out)
    with _claimed(out):
        plan = make_plan(source, config)
        _adopt(out, plan)
        manifest = finished(out, plan)
        if manifest is None:
            infos = _write_shards(out, plan, source, config.workers)
            manifest = _write_index(out, plan, source, infos)
        else:
            sys.stdout.write(f"{out}: already complete\n")
    _summarise(manifest, time.monotonic() - started)
    return 0


def make_plan(source: Source, config: ShardConfig) -> Plan:
    """Fix the content of every shard; the first tile in order says which size all must have."""
    words = np.random.Philox(key=config.seed).random_raw(len(source))
    order = np.argsort(words, kind="stable").astype(np.int64)
    first = source.tiles(order[:1])[0]
    where = source.reader.where(first)
    size = None if config.resize is not None else image_size(source.reader.read(first), where)
    options = asdict(config)
    for name in ("source", "out", "workers"):  # these do not change a byte of the result
        del options[name]
    identity = json.dumps([source.name, source.digest, source.classes, options], sort_keys=True)
    packing = Packing(
        source=source.name,
        classes=tuple(source.classes),
        encode=config.encode,
        quality=config.quality,
        resize=config.resize,
        tile_size=size,
        reference=where,
    )
    digest = hashlib.sha256(identity.encode()).hexdigest()
    return Plan(digest=digest, order=order, samples_per_shard=config.samples_per_shard, packing=packing)


@contextmanager
def _claimed(out: Path) -> Iterator[None]:
    """Make the folder and keep other runs out of it; the lock goes with this process, however it ends."""
    with writing(out):
        (out / _PLAN_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = (out / _PLAN_FOLDER / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{out}: another `ca2cl shard` is writing here; wait for it") from None
        except OSError as error:  # file systems without locks
            logger.warning("%s: cannot be locked (%s); do not shard into it twice at once", out, error.strerror)
        _remove_leftovers(out)
        yield


def _remove_leftovers(out: Path) -> None:
    for folder in (out, out / _PLAN_FOLDER):
        for leftover in folder.glob(".*.tmp-*"):
            with writing(leftover):
                leftover.unlink(missing_ok=True)


def _adopt(out: Path, plan: Plan) -> None:
    """Take the folder for this plan, or refuse it because it holds another's shards."""
    path = out / _PLAN_FOLDER / "plan.json"
    try:
        known = json.loads(path.read_bytes())["digest"]
    except FileNotFoundError:
        if (out / MANIFEST_NAME).exists() or any(out.glob("*.tar")):
            raise InputError(f"{out}: holds shards that this run did not write; give an empty folder") from None
        write_atomic(path, json.dumps({"digest": plan.digest}).encode())
        return
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged; give an empty folder") from None
    if known != plan.digest:
        raise InputError(f"{out}: holds shards of another source or of other options; give an empty folder")


def finished(out: Path, plan: Plan) -> Manifest | None:
    """The manifest if the folder is complete and undamaged; else it is withdrawn and the shards are looked at again."""
    path = out / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        index = ShardIndex(out)
        index.verify()
        if len(index) == len(plan.order):
            return index.manifest
    except InputError as error:
        logger.warning("%s", error)
    with writing(path):
        path.unlink()
    return None


def _sidecar(out: Path, name: str) -> Path:
    return out / _PLAN_FOLDER / f"{name}.json"


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:06d}.tar"


def make_shard(job: Job, reader: TileReader, packing: Packing) -> ShardInfo:
    """Write one shard, unless a run before this one finished it."""
    path = Path(job.out) / shard_name(job.shard)
    sidecar = _sidecar(Path(job.out), path.name)
    with suppress(OSError, ValueError, KeyError, TypeError):
        info, _ = read_sidecar(sidecar)
        if path.stat().st_size == info.bytes and file_sha256(path) == info.sha256:
            return info
    info, samples = pack(path, job.tiles, reader, packing)
    write_sidecar(sidecar, info, samples)
    return info


def _write_shards(out: Path, plan: Plan, source: Source, workers: int) -> list[ShardInfo]:
    """Write all shards; their infos in shard order."""
    infos: dict[int, ShardInfo] = {}
    jobs = (Job(str(out), shard, source.tiles(plan.rows(shard))) for shard in range(plan.shards))
    logged = time.monotonic()
    with tqdm(total=len(source), unit="tile", disable=None, desc="shard") as bar:
        for shard, info in _results(jobs, source.reader, plan.packing, min(workers, plan.shards)):
            infos[shard] = info
            bar.update(info.samples)
            if bar.disable and time.monotonic() - logged > _LOG_SECONDS:
                logged = time.monotonic()
                logger.info("%d of %d shards written", len(infos), plan.shards)
    return [infos[shard] for shard in range(plan.shards)]


def _results(
    jobs: Iterator[Job], reader: TileReader, packing: Packing, workers: int
) -> Iterator[tuple[int, ShardInfo]]:
    """Run the jobs; yields shard numbers and infos in order of completion."""
    if workers == 1:
        for job in jobs:
            yield job.shard, make_shard(job, reader, packing)
        return
    # spawned: a forked child would inherit the threads' locks of whatever the caller has loaded
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(reader, packing))
    pending: dict[Future[ShardInfo], int] = {}
    try:
        for job in jobs:
            pending[pool.submit(_work, job)] = job.shard
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


@dataclass
class _Worker:
    """What a writing process was started with; set once in each."""

    reader: TileReader | None = None
    packing: Packing | None = None


_WORKER = _Worker()


def _start_worker(reader: TileReader, packing: Packing) -> None:
    _WORKER.reader, _WORKER.packing = reader, packing
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    # a pool's processes outlive a parent that was killed: they wait on a queue that they hold open themselves
    threading.Thread(target=follow, daemon=True).start()


def _work(job: Job) -> ShardInfo:
    assert _WORKER.reader is not None and _WORKER.packing is not None
    return make_shard(job, _WORKER.reader, _WORKER.packing)


class _Parts(Sequence[tuple[ShardInfo, ShardSamples]]):
    """Every shard's samples, read from its sidecar only when asked for: an index may be larger than memory."""

    def __init__(self, out: Path, infos: Sequence[ShardInfo]) -> None:
        self._out = out
        self._infos = infos

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, shard: Any) -> Any:
        return read_sidecar(_sidecar(self._out, self._infos[shard].name))


def _write_index(out: Path, plan: Plan, source: Source, infos: Sequence[ShardInfo]) -> Manifest:
    temporary = out / f".{INDEX_NAME}.tmp-{os.getpid()}"
    with writing(out / INDEX_NAME):
        write_index(temporary, _Parts(out, infos))
    sync_replace(temporary, out / INDEX_NAME)
    packing = plan.packing
    size = packing.tile_size or (packing.resize, packing.resize)
    tile_size = [int(side) for side in size if side is not None]
    labels = source.labels[source.labels >= 0]
    counts = np.bincount(labels, minlength=len(source.classes)).tolist()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        classes=list(source.classes),
        counts=dict(zip(source.classes, counts, strict=True)),
        tile_size=tile_size,
        source=source.name,
        encode=packing.encode,
        samples=len(source),
        shards=len(infos),
        bytes=sum(info.bytes for info in infos),
        digest=digest_of(source.classes, tile_size, infos),
    )
    write_atomic(out / MANIFEST_NAME, json.dumps(asdict(manifest), indent=2).encode())
    for info in infos:
        with suppress(OSError):  # the index now says it all
            _sidecar(out, info.name).unlink()
    return manifest


def _summarise(manifest: Manifest, seconds: float) -> None:
    height, width = manifest.tile_size
    classes = " ".join(f"{name}={count}" for name, count in manifest.counts.items()) or "none (unlabelled)"
    lines = (
        f"tiles    {manifest.samples} of {width} x {height} px",
        f"classes  {classes}",
        f"shards   {manifest.shards}, {manifest.bytes / 1e6:.1f} MB",
        f"rate     {manifest.samples / max(seconds, 1e-9):.0f} tiles/s in {seconds:.1f} s",
        f"digest   {manifest.digest}",
    )
    sys.stdout.write("\n".join(lines) + "\n")
