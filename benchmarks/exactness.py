"""Does a step depend on the hardware? The same run on every number of processes, micro-batches and engines, compared.

    python -m benchmarks.exactness [--processes 1 2 4] [--micro_batches 1 2 4] [--engines ddp zero1 zero2]
                                   [--accumulation bitwise] [--norm lane_group] [--optimizer sgd] [--lr 0.01]

Every cell is a real ``accelerate launch -m ca2cl pretrain`` (gloo processes on the CPU, fp32, clusters and adversary
on) of made-up tissue, compared with one process that holds each batch at once: the largest relative difference of any
loss term in any step; the largest relative difference of a weight tensor at the end (running statistics too), and of
which; and whether every global batch held the same tiles. ``sync`` is compared for one micro-batch only: its statistics
are a micro-batch's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from tqdm import tqdm

from benchmarks.jobs import ENGINES, LANES, Cell, train, write_shards
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex

TERMS = ("loss", "nt_xent", "cluster", "nt_xent_adversarial")
LIMIT = 1e-5


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
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2, 4], help="of a process, a step")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
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
    counts = [1] if options.norm == "sync" else options.micro_batches
    cells = [Cell(*cell) for cell in itertools.product(options.engines, options.processes, counts)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = write_shards(folder)

        def run(cell: Cell, group: str = "cells") -> Outcome:
            out = folder / group / f"{cell.engine}-{cell.processes}-{cell.micro_batches}"
            train(cell, out, shards, options)
            return Outcome(out)

        expected = run(Cell("ddp", 1, 1), "expected")
        print(
            f"{options.accumulation}, {options.norm}, {options.optimizer}, lr {options.lr:g}, {options.steps} steps of "
            f"{options.batch} (groups of {options.group}, blocks of {options.block}), fp32\n"
        )
        print("| engine | processes | micro-batches | losses | weights | the tensor | same tiles |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        worst = 0.0
        pool = ThreadPoolExecutor(options.jobs)
        runs = pool.map(run, cells)
        for cell, found in tqdm(zip(cells, runs, strict=True), desc="cells", total=len(cells), disable=None):
            loss, weight, tensor = differences(expected, found)
            tensor = tensor if weight else "-"
            tiles = "yes" if same_tiles(shards, cell.processes, options) else "NO"
            print(
                f"| {cell.engine} | {cell.processes} | {cell.micro_batches} | {loss:.1e} | {weight:.1e} | {tensor} "
                f"| {tiles} |",
                flush=True,
            )
            worst = max(worst, loss, weight)
    print(f"\nlargest difference {worst:.1e} (wanted {LIMIT:g})")


if __name__ == "__main__":
    main()
