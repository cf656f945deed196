"""Does a step depend on the hardware? The same run on every number of processes, micro-batches and engines, compared.

    python -m benchmarks.exactness [--arch resnet18] [--image_size 32] [--processes 1 2 4] [--micro_batches 1 2 4]
                                   [--engines ddp zero1 zero2 fsdp] [--accumulation bitwise] [--norm lane_group]
                                   [--optimizer sgd] [--lr 0.01]

Every cell is a real ``accelerate launch -m ca2cl pretrain`` (gloo processes on the CPU, fp32, clusters and adversary
on) of made-up tissue, compared with one process that holds each batch at once: the largest relative difference of any
loss term in any step; the largest relative difference of a weight tensor at the end (running statistics too), and of
which; and whether every global batch held the same tiles. ``sync`` is compared for one micro-batch only: its statistics
are a micro-batch's. FSDP2 needs two processes and has no ``bitwise``: its rows are ``exact`` on either side.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.jobs import ENGINES, LANES, Cell, accumulation, train, write_shards
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex

TERMS = ("loss", "nt_xent", "cluster", "nt_xent_adversarial")
LIMITS = {"bitwise": 0.0, "exact": 1e-5}
"""Wanted of losses and weights. Of ``exact`` it is rounding's, until an activation crosses a ReLU."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: its loss terms step by step, and its weights."""

    folder: Path

    @property
    def losses(self) -> list[dict[str, float]]:
        lines = (json.loads(line) for line in (self.folder / "journal.jsonl").read_text().splitlines())
        return [{name: line[name] for name in TERMS} for line in lines if "step" in line]

    @property
    def weights(self) -> dict[str, object]:
        (checkpoint,) = (self.folder / "checkpoints").glob("step-*")
        return dict(load_file(checkpoint / "model.safetensors"))


def differences(expected: Outcome, found: Outcome) -> tuple[float, float, str]:
    """Largest relative difference of a loss term, of a weight tensor, and that tensor's name."""
    loss = max(
        abs(b[name] - a[name]) / abs(a[name])
        for a, b in zip(expected.losses, found.losses, strict=True)
        for name in TERMS
    )
    ours, theirs = expected.weights, found.weights
    moved = {
        name: float((theirs[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-12))  # type: ignore[attr-defined]
        for name, value in ours.items()
        if value.is_floating_point()  # type: ignore[attr-defined]
    }
    worst = max(moved, key=lambda name: moved[name])
    return loss, moved[worst], worst


def same_tiles(shards: Path, processes: int, options: argparse.Namespace) -> bool:
    """Whether that many ranks together read, in every global batch, the keys that one reads, in the same places."""

    def batches(world: int) -> list[dict[int, str]]:
        index = ShardIndex(shards)
        found: list[dict[int, str]] = [{} for _ in range(options.steps)]
        for rank in range(world):
            order = LaneOrder(index, LANES, options.batch, 0)
            stream = LaneStream(
                index, order, ShardReader(str(shards)), rank=rank, world=world, workers=0, start_step=0,
                stop_step=options.steps,
            )  # fmt: skip
            for number, batch in enumerate(stream):
                found[number].update(zip(batch.positions.tolist(), batch.keys, strict=True))
        return found

    return batches(processes) == batches(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image_size", type=int, default=32, help="side of the views")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4], help="of a process, a step")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "zero1", "zero2"])
    parser.add_argument("--accumulation", choices=("bitwise", "exact"), default="bitwise")
    parser.add_argument("--norm", choices=("lane_group", "sync", "frozen"), default="lane_group")
    parser.add_argument("--optimizer", choices=("sgd", "adam", "adamw"), default="sgd")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--group", type=int, default=4, help="tiles that share lane_group's statistics")
    parser.add_argument("--block", type=int, default=4, help="groups that make up a block")
    parser.add_argument("--jobs", type=int, default=1, help="cells that run at a time")
    options = parser.parse_args()
    print(
        f"{options.accumulation}, {options.arch} at {options.image_size} px, {options.norm}, {options.optimizer}, lr "
        f"{options.lr:g}, {options.steps} steps of {options.batch} (groups of {options.group}, blocks of "
        f"{options.block}), fp32\n"
    )
    with tempfile.TemporaryDirectory() as temporary:
        worst = table(Path(temporary), options)
    print()
    for kind, difference in worst.items():
        print(f"{kind}: largest difference {difference:.1e} (wanted: {LIMITS[kind]:g})")
    if any(difference > LIMITS[kind] for kind, difference in worst.items()):
        raise SystemExit(1)


def table(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Run and print all cells; the largest difference by kind of accumulation."""
    counts = [1] if options.norm == "sync" else options.micro_batches
    grid = (Cell(*cell) for cell in itertools.product(options.engines, options.processes, counts))
    cells = [cell for cell in grid if cell.engine != "fsdp" or cell.processes > 1]
    with contextlib.redirect_stdout(sys.stderr):
        shards = write_shards(folder)

    def run(cell: Cell, group: str = "cells") -> Outcome:
        out = folder / group / f"{cell.engine}-{cell.processes}-{cell.micro_batches}"
        train(cell, out, shards, options)
        return Outcome(out)

    @cache
    def expected(kind: str) -> Outcome:
        own = argparse.Namespace(**{**vars(options), "accumulation": kind})
        train(Cell("ddp", 1, 1), folder / "expected" / kind, shards, own)
        return Outcome(folder / "expected" / kind)

    print("| engine | accumulation | processes | micro-batches | losses | weights | the tensor | same tiles |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    worst: dict[str, float] = {}
    runs = ThreadPoolExecutor(options.jobs).map(run, cells)
    for cell, found in tqdm(zip(cells, runs, strict=True), desc="cells", total=len(cells), disable=None):
        kind = accumulation(cell, options.accumulation)
        loss, weight, tensor = differences(expected(kind), found)
        tiles = "yes" if same_tiles(shards, cell.processes, options) else "NO"
        print(
            f"| {cell.engine} | {kind} | {cell.processes} | {cell.micro_batches} | {loss:.1e} | {weight:.1e} "
            f"| {tensor if weight else '-'} | {tiles} |",
            flush=True,
        )
        worst[kind] = max(worst.get(kind, 0.0), loss, weight)
    return worst


if __name__ == "__main__":
    main()
