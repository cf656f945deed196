"""Tiles/s of the lane stream against the plain loader that everybody writes, in one run.

    python -m benchmarks.loader [--folder CLASS_FOLDER_TREE] [--workers 1] [--batch_size 128] [--tiles 2048]
                                [--repeats 5]

Baseline: ``torchvision.datasets.ImageFolder`` + PIL + ``pil_to_tensor`` through a ``DataLoader`` with the same workers
and batch size. Both read, parse, decode and batch the same encoded tiles, shuffled, from files in the page cache. Both
are confined to ``--workers`` cores, so that with one worker the number is tiles/s a core, the training process's share
included. Repeats are interleaved and the median is taken, because other work comes and goes on a machine; the rate for
a second of CPU time, of all processes together, is given too, since other work hardly touches it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard

LANES = 64
SIDE = 224
HAEMATOXYLIN = np.array([0.65, 0.70, 0.29])
EOSIN = np.array([0.07, 0.99, 0.11])


def stain_density(rng: np.random.Generator, side: int) -> np.ndarray:
    """Noise on five scales, shape (side, side), about 0 to 1: it compresses to a real tile's JPEG size."""
    density = np.zeros((side, side))
    for cells, weight in ((4, 0.8), (14, 0.9), (28, 0.8), (56, 0.6), (112, 0.4)):
        coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
        density += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return 1 / (1 + np.exp(-1.6 * density))


def tissue(seed: int, side: int = SIDE) -> Image.Image:
    """A random texture in the colours of H&E, by Beer and Lambert's law."""
    rng = np.random.default_rng(seed)
    absorbed = stain_density(rng, side)[..., None] * HAEMATOXYLIN + 0.7 * stain_density(rng, side)[..., None] * EOSIN
    light = 245 * np.exp(-absorbed) + rng.normal(scale=2, size=(side, side, 3))
    return Image.fromarray(light.clip(0, 255).astype(np.uint8))


def write_tiles(root: Path, kind: str, count: int) -> Path:
    """Write ``count`` tiles in four classes as 224 px JPEG (quality 90) or uncompressed TIFF."""
    for number in range(count):
        path = root / f"class{number % 4}" / f"tile{number:06d}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        # 64 textures are enough for either decoder, and most of this benchmark's time would go into more.
        tissue(number % 64).save(path, **({"quality": 90} if kind == "jpg" else {}))
    return root


def baseline(folder: Path, workers: int, batch_size: int) -> Callable[[], int]:
    """A pass of the plain loader; returns the number of tiles."""
    dataset = ImageFolder(str(folder), transform=pil_to_tensor)

    def one_pass() -> int:
        loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=workers, drop_last=True)
        return sum(len(tiles) for tiles, _ in loader)

    return one_pass


def ours(shards: Path, workers: int, batch_size: int) -> Callable[[], int]:
    """A pass of the lane stream; returns the number of tiles."""
    index = ShardIndex(shards)
    order = LaneOrder(index, LANES, batch_size, seed=0)
    reader = ShardReader(shards, index=index)

    def one_pass() -> int:
        stream = LaneStream(index, order, reader, workers=workers, stop_step=order.steps_per_epoch, pin=False)
        return sum(len(batch.tiles) for batch in stream)

    return one_pass


@dataclass(frozen=True)
class Rate:
    """Medians over the passes: tiles a second of wall time, and a second of CPU time of all processes together."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """CPU time of this process and of its finished children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def rates(passes: dict[str, Callable[[], int]], repeats: int) -> dict[str, Rate]:
    """The rate of each pass, interleaved; the first round only warms up."""
    wall: dict[str, list[float]] = {name: [] for name in passes}
    cpu: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(repeats + 1):
        for name, one_pass in passes.items():
            began, used = time.perf_counter(), cpu_seconds()
            tiles = one_pass()
            wall[name].append(tiles / (time.perf_counter() - began))
            cpu[name].append(tiles / (cpu_seconds() - used))
    return {name: Rate(statistics.median(wall[name][1:]), statistics.median(cpu[name][1:])) for name in passes}


@contextlib.contextmanager
def confined(cores: int) -> Iterator[None]:
    """Run on ``cores`` of this process's cores only, workers included."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-max(1, cores) :])
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def compare(name: str, folder: Path, scratch: Path, settings: argparse.Namespace) -> None:
    """Shard ``folder``, time both loaders on it, and print one line."""
    shards = scratch / f"{folder.name}-shards"
    with contextlib.redirect_stdout(sys.stderr):
        shard(ShardConfig(source=str(folder), out=str(shards)))
    workers, batch = settings.workers, settings.batch_size
    with confined(workers):
        passes = {"ours": ours(shards, workers, batch), "baseline": baseline(folder, workers, batch)}
        found = rates(passes, settings.repeats)
    mine, plain = found["ours"], found["baseline"]
    print(
        f"{name}: {mine.wall:,.0f} tiles/s, {mine.cpu:,.0f} a CPU second; ImageFolder + PIL + DataLoader "
        f"{plain.wall:,.0f} and {plain.cpu:,.0f}; ratio {mine.wall / plain.wall:.2f} and {mine.cpu / plain.cpu:.2f} "
        f"({workers} worker(s), {max(1, workers)} core(s), batches of {batch})",
        flush=True,
    )


def main() -> None:
    """Make or take the tiles, shard them, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="tree of class folders with tiles of one size; none makes them up")
    parser.add_argument("--workers", type=int, default=1, help="decoding processes and cores of both loaders")
    parser.add_argument("--batch_size", type=int, default=128, help="tiles of a batch")
    parser.add_argument("--tiles", type=int, default=2048, help="made-up tiles of each format")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes of each loader")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        if settings.folder:
            compare(settings.folder.name, settings.folder, root, settings)
            return
        for name, kind in (("224 px JPEG", "jpg"), ("224 px uncompressed TIFF", "tif")):
            folder = write_tiles(root / kind, kind, settings.tiles)
            compare(name, folder, root, settings)


if __name__ == "__main__":
    main()
