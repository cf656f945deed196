"""Pre-training on one GPU: tiles a second, what share of the device's own rate that is, waits and memory.

    python -m benchmarks.gpu [--archs resnet18 resnet50] [--batches 256 896 1792] [--precisions bf16 fp16]
                             [--norms sync lane_group frozen] [--steps 20] [--size 224] [--plain]

Every case runs the training loop's own parts (feed, views, step, optimizer, numbers read a step late) on tiles that lie
decoded in pinned memory, so that reading and decoding, which CPUs do beside it, are left out (``benchmarks.loader``).

- tiles/s: of whole steps, by the clock, after ``--warm_up`` steps.
- of resident: the same step on views that lie on the device already, its rate over this one's.
- data wait: the host's share of the time in which it asked for the next batch, copies and views of it started.
- pairs/s: views alone.
- ``--plain``: the naive form on the same card, two backward passes over tiles whose views torchvision's v2 transforms
  make on the CPU, tile by tile on one core; its rate with one core, and with as many as would keep the device busy.

Without a GPU it runs on the CPU, where its numbers mean little; the table names the device.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.step import naive_gradient
from benchmarks.views import baseline as torchvision_views
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig, OptimConfig, ViewsConfig
from ca2cl.data.loading.stream import TileBatch
from ca2cl.methods.base import Tiles
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.heads import Network
from ca2cl.pretrain.batches import feed
from ca2cl.pretrain.numerics import choose_kernels
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.precision import HALF
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer
from ca2cl.training.readings import Reading
from ca2cl.views.build import build_views

GROUP, BLOCK = 16, 4


class Case(NamedTuple):
    """One line of the table."""

    arch: str
    batch: int
    precision: Any
    norm: Any


class Rates(NamedTuple):
    """What was measured of a case."""

    tiles_per_s: float
    resident_per_s: float
    waited: float
    """Share of the time."""
    peak_gb: float


def host_tiles(batch: int, size: int, count: int = 3) -> list[TileBatch]:
    """Batches of noise in pinned memory, as the stream gives them."""
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(count):
        tiles = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)
        keys = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
        rows = torch.arange(batch)
        tiles = tiles.pin_memory() if torch.cuda.is_available() else tiles
        found.append(TileBatch(number, 0, tiles, keys, rows, rows, rows, [""] * batch, []))
    return found


class Job:
    """A case's network and optimizer, and its step on a batch."""

    def __init__(self, case: Case, size: int) -> None:
        torch.manual_seed(0)
        accelerator = build_accelerator()
        choose_kernels(accelerator.device, tf32=False)
        encoder = build_encoder(case.arch, case.norm, group=GROUP, identity_blocks=True)
        network = Network(encoder).train()
        optimizer = build_optimizer(OptimConfig(name="adam"), network, fused=accelerator.device.type == "cuda")
        self.engine = AccelerateEngine(accelerator, network, optimizer, case.precision)
        self.method = CA2CL(ObjectiveConfig(epsilon=0.1, epsilon_mode="relative"))
        half = HALF.get(case.precision, torch.float32)
        config = ViewsConfig(recipe="ca2cl")
        self._views = build_views(config, size, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, dtype=half)
        self._case, self._late = case, list[Reading]()

    def views(self, tiles: Tiles) -> Any:
        """As the method has them."""
        return self.method.views(tiles, self._views)

    def data(self, batches: list[TileBatch]) -> Iterator[Any]:
        """The loop's steps, over and over."""
        groups = None
        if self._case.norm == "lane_group":
            groups = LaneGroups(self._case.batch, self._case.batch, GROUP, BLOCK)
        stream: Any = itertools.cycle(batches)
        for fed in feed(stream, self.views, self.engine.device, self._case.batch, groups):
            yield fed.micro_batches

    def step(self, micro_batches: Any) -> None:
        """As ``training.loop`` takes it."""
        self.engine.keep_buffers()
        terms = self.method.step(self.engine, micro_batches)
        self._late.append(Reading(terms, self.engine.optimizer_step(1e-3, None, terms["loss"]), {}))
        if len(self._late) > 1:
            self._late.pop(0).read()


def synchronize() -> None:
    """Wait until the device has done everything."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(steps: int, warm_up: int, one: Callable[[], float]) -> tuple[float, float]:
    """Seconds of ``steps`` calls after ``warm_up`` ones, and the sum of what they returned."""
    for _ in range(warm_up):
        one()
    synchronize()
    began = time.perf_counter()
    returned = sum(one() for _ in range(steps))
    synchronize()
    return time.perf_counter() - began, returned


def measure(case: Case, options: argparse.Namespace) -> Rates:
    """One case."""
    job, batches = Job(case, options.size), host_tiles(case.batch, options.size)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    data = job.data(batches)

    def whole() -> float:
        began = time.perf_counter()
        micro_batches = next(data)
        waited = time.perf_counter() - began
        job.step(micro_batches)
        return waited

    seconds, waited = timed(options.steps, options.warm_up, whole)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    resident = [next(data)[0]]

    def alone() -> float:
        job.step(resident)
        return 0.0

    without, _ = timed(options.steps, options.warm_up, alone)
    tiles = case.batch * options.steps
    return Rates(tiles / seconds, tiles / without, waited / seconds, peak)


def views_alone(batch: int, options: argparse.Namespace) -> float:
    """Pairs of views a second of tiles on the device."""
    job = Job(Case("resnet18", batch, "no", "frozen"), options.size)
    (one, *_) = host_tiles(batch, options.size, 1)
    tiles = one.tiles.to(job.engine.device)

    def both() -> float:
        job.views(Tiles(tiles, one.key_hash, 0, one.positions))
        return 0.0

    seconds, _ = timed(options.steps, options.warm_up, both)
    return batch * options.steps / seconds


def plain(case: Case, options: argparse.Namespace) -> tuple[float, float]:
    """Tiles a second of the naive form's step on resident views, and of torchvision's views on one core."""
    device = build_accelerator().device
    network = Network(build_encoder(case.arch, case.norm, identity_blocks=True)).train().to(device)
    optimizer = build_optimizer(OptimConfig(name="adam"), network)
    x1, x2 = (torch.randn(case.batch, 3, options.size, options.size, device=device) for _ in range(2))
    half = {"bf16": torch.bfloat16, "fp16": torch.float16, "no": None}[case.precision]

    def one() -> float:
        with torch.autocast(device.type, half, enabled=half is not None):
            naive_gradient(network, x1, x2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return 0.0

    seconds, _ = timed(options.steps, options.warm_up, one)
    few: Tensor = host_tiles(32, options.size, 1)[0].tiles
    make = torchvision_views(few)
    torch.set_num_threads(1)
    make()
    began = time.process_time()
    make()
    return case.batch * options.steps / seconds, len(few) / (time.process_time() - began)


def card() -> str:
    """The device and the commit, for the table's caption."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    commit = "unknown commit"
    with suppress(OSError, subprocess.CalledProcessError):
        shown = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        commit = f"commit {shown.stdout.strip()}"
    return f"{name}, {commit}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} CPU cores"


def main() -> int:
    """Print a line of a Markdown table as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet18", "resnet50"])
    parser.add_argument("--batches", nargs="+", type=int, default=[256, 896, 1792])
    parser.add_argument("--precisions", nargs="+", choices=("no", "bf16", "fp16"), default=["bf16", "fp16"])
    parser.add_argument("--norms", nargs="+", choices=("sync", "lane_group", "frozen"), default=["sync", "lane_group"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="the naive form, too")
    options = parser.parse_args()
    print(f"{card()}; {options.size} px, {options.steps} steps a case\n")
    print("| body | batch | precision | norm | tiles/s | of resident | data wait | peak GB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    chosen = (options.archs, options.batches, options.precisions, options.norms)
    for case in itertools.starmap(Case, itertools.product(*chosen)):
        try:
            found = measure(case, options)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"| {' | '.join(map(str, case))} | out of memory | | | |", flush=True)
            continue
        print(
            f"| {' | '.join(map(str, case))} | {found.tiles_per_s:,.0f} | "
            f"{found.tiles_per_s / found.resident_per_s:.2f} | {found.waited:.1%} | {found.peak_gb:.1f} |",
            flush=True,
        )
    for batch in options.batches:
        print(f"\nviews alone, {batch} tiles: {views_alone(batch, options):,.0f} pairs/s", flush=True)
    if options.plain:
        case = Case(options.archs[0], options.batches[0], options.precisions[0], options.norms[0])
        steps, cpu = plain(case, options)
        print(
            f"\nplain form, {case.arch}, {case.batch} tiles, {case.precision}: {min(steps, cpu):,.0f} tiles/s with "
            f"torchvision's views on one core ({cpu:,.0f}); its step alone {steps:,.0f}, which {steps / cpu:.0f} cores "
            "would feed"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
