"""Seconds and memory to go on at step 10^6 of 10^8 samples, against the bars of 1 s and 1 GB.

    python -m benchmarks.resume [--samples 100000000] [--step 1000000] [--batch 1024] [--lanes 64] [--folder FOLDER]
                               [--max_per_slide N]

The index is made up, but is written by ca2cl's own writer and read as any other: 1,000 samples a shard, each with a
key, a label and a slide, 6 GB for 10^8 of them. There is one real tar, of small JPEG tiles; every shard is a link to
it, so that the first batch is read and decoded as well. Measured in a process of its own, without workers (whose start
is not seeking), first with the index out of the page cache and then again from it:

- open: index and manifest are checked, and the size of every tar;
- order: with ``--max_per_slide``, the slides of all samples are read and sorted (no bar applies then);
- seek: from there to the first batch's tiles;
- of these CPU: the seconds of processor time, which other work on the machine does not change.

Peak memory is the whole process's, torch and what is mapped of the index included. A folder
that is given is kept, and used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import simplejpeg

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.slide_order import SlideOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    Manifest,
    ShardIndex,
    digest_of,
    write_index,
)
from ca2cl.data.shards.samples import ShardInfo, ShardSamples

PER_SHARD = 1000
SIDE = 32
CLASSES = tuple(f"class-{number}" for number in range(9))
SEEK_S, PEAK_GB = 1.0, 1.0


class Parts(Sequence[tuple[ShardInfo, ShardSamples]]):
    """The shards' entries, made when they are asked for: links to one tar, each with keys of its own."""

    def __init__(self, tar: Path, shards: int) -> None:
        self._shards, self._bytes = shards, tar.stat().st_size
        self._sha256 = hashlib.sha256(tar.read_bytes()).hexdigest()
        self._offset, self._size = places(tar)
        self._label = (np.arange(PER_SHARD) % len(CLASSES)).astype(np.int32)
        self._ext = pa.array(["jpg"] * PER_SHARD)
        self._rows = np.array([list(b"%03d" % row) for row in range(PER_SHARD)], np.uint8)

    def __len__(self) -> int:
        return self._shards

    def __iter__(self) -> Iterator[tuple[ShardInfo, ShardSamples]]:
        return (self[number] for number in range(self._shards))

    @overload
    def __getitem__(self, number: int) -> tuple[ShardInfo, ShardSamples]: ...
    @overload
    def __getitem__(self, number: slice) -> list[tuple[ShardInfo, ShardSamples]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        """Shard ``number``."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        samples = ShardSamples(
            key=strings(b"tile-%06d-", number, self._rows), ext=self._ext, offset=self._offset, size=self._size,
            label=self._label, group=strings(b"slide-%06d", number // 4, self._rows[:, :0]),
        )  # fmt: skip
        return self.info(number), samples

    def info(self, number: int) -> ShardInfo:
        """What the index says of a tar."""
        return ShardInfo(f"shard-{number:06d}.tar", self._bytes, self._sha256, PER_SHARD)


def strings(prefix: bytes, number: int, ends_RD: np.ndarray) -> pa.Array:
    """R strings as an Arrow column: all begin with the number, and end with their D characters."""
    head = np.frombuffer(prefix % number, np.uint8)
    text = np.concatenate([np.broadcast_to(head, (len(ends_RD), len(head))), ends_RD], 1)
    offsets = np.arange(0, text.size + 1, text.shape[1], dtype=np.int32)
    return pa.StringArray.from_buffers(len(text), pa.py_buffer(offsets), pa.py_buffer(text))


def places(tar: Path) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of the tiles in a tar."""
    with tarfile.open(tar) as opened:
        members = opened.getmembers()
    return np.array([m.offset_data for m in members], np.int64), np.array([m.size for m in members], np.int64)


def make(folder: Path, samples: int) -> None:
    """Write index, manifest, one tar and the links to it."""
    import webdataset  # not a part of what is measured

    folder.mkdir(parents=True, exist_ok=True)
    tar, rng = folder / "tiles", np.random.default_rng(0)
    with webdataset.TarWriter(str(tar), encoder=False) as writer:
        for number in range(PER_SHARD):
            tile = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            writer.write({"__key__": f"{number:04d}", "jpg": simplejpeg.encode_jpeg(tile)})
    parts = Parts(tar, samples // PER_SHARD)
    infos = [parts.info(number) for number in range(len(parts))]
    for info in infos:
        (folder / info.name).symlink_to(tar.name)
    write_index(folder / INDEX_NAME, parts)
    counts = dict.fromkeys(CLASSES, samples // len(CLASSES))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION, classes=list(CLASSES), counts=counts, tile_size=[SIDE, SIDE], source="made up",
        encode="keep", samples=samples, shards=len(infos), bytes=sum(info.bytes for info in infos),
        digest=digest_of(CLASSES, [SIDE, SIDE], infos),
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_text(json.dumps(asdict(manifest)))


def resume(folder: Path, step: int, batch: int, lanes: int, limit: int | None) -> dict[str, float]:
    """Seconds and peak memory of going on at ``step``, in this process."""
    times = [(time.perf_counter(), time.process_time())]
    index = ShardIndex(folder)
    times.append((time.perf_counter(), time.process_time()))
    order = LaneOrder(index, lanes, batch, seed=0) if limit is None else SlideOrder(index, lanes, batch, 0, limit)
    times.append((time.perf_counter(), time.process_time()))
    reader = ShardReader(folder, index=index)
    first = next(iter(LaneStream(index, order, reader, start_step=step, stop_step=step + 1)))
    times.append((time.perf_counter(), time.process_time()))
    assert first.step == step and len(first.keys) == batch and not first.bad
    (opening, opening_cpu), (ordering, ordering_cpu), (seek, seek_cpu) = np.diff(times, axis=0).tolist()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    seconds = {"open": opening, "open_cpu": opening_cpu, "order": ordering, "order_cpu": ordering_cpu}
    return {**seconds, "seek": seek, "seek_cpu": seek_cpu, "peak": peak}


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10**8)
    parser.add_argument("--step", type=int, default=10**6)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--max_per_slide", type=int)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        limit = options.max_per_slide
        print(json.dumps(resume(options.folder, options.step, options.batch, options.lanes, limit)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / MANIFEST_NAME).exists():
            began = time.perf_counter()
            make(folder, options.samples)
            print(f"index of {options.samples:,} samples written in {time.perf_counter() - began:.0f} s", flush=True)
        print(f"{(folder / INDEX_NAME).stat().st_size / 1e9:.2f} GB; {len(os.sched_getaffinity(0))} cores\n")
        print(
            "| index | open, s | of these CPU | order, s | of these CPU | seek, s (wanted 1) | of these CPU | "
            "peak, GB (wanted 1) |"
        )
        print("| --- " * 8 + "|")
        numbers = ("--step", str(options.step), "--batch", str(options.batch), "--lanes", str(options.lanes))
        limit = [] if options.max_per_slide is None else ["--max_per_slide", str(options.max_per_slide)]
        command = [sys.executable, "-m", "benchmarks.resume", "--row", "--folder", str(folder), *numbers, *limit]
        missed = False
        for state in ("cold", "warm"):
            if state == "cold":
                forget(folder / INDEX_NAME)
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            missed |= not limit and (found["seek"] + found["order"] > SEEK_S or found["peak"] > PEAK_GB)
            cells = [found[name] for name in ("open", "open_cpu", "order", "order_cpu", "seek", "seek_cpu", "peak")]
            print(f"| {state} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)
    if missed:
        raise SystemExit("a bar was missed")


if __name__ == "__main__":
    main()
