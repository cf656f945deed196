"""Bytes on the wire a step, by engine, counted by the kernel.

    python -m benchmarks.wire [--engines ddp zero1 zero2 fsdp] [--arch resnet18] [--processes 2] [--batch 64]  (as root)

Each job runs in a network namespace of its own, whose loopback carries nothing else; the bytes of a long run less those
of a short one, over the steps between them and the processes, are what one process sends in a step (TCP's headers
included). Beside it what ``benchmarks.growth`` expects, and the ratio of the two: 4 bytes a parameter all-reduced by
DDP; by DeepSpeed half as much again, for it gathers weights after the all-reduce; ``bitwise`` all-reduces 8 bytes by
itself, after which DDP has nothing to send, while DeepSpeed does what it always does. FSDP2, which has no ``bitwise``,
gathers weights for every pass and reduces gradients thrice.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import growth
from benchmarks.jobs import ENGINES, Cell, train, write_shards

SHORT, LONG = 1, 5
JOB = {"norm": "lane_group", "group": 4, "block": 4, "optimizer": "sgd", "lr": 1e-3}
_COUNT = 'ip link set lo up; GLOO_SOCKET_IFNAME=lo "$@" >&2 || exit 1; grep lo: /proc/net/dev'


def available() -> bool:
    """Whether this user may make network namespaces."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode == 0


def sent(cell: Cell, out: Path, shards: Path, options: argparse.Namespace) -> int:
    """Bytes that all processes of a job sent."""
    line = train(cell, out, shards, options, "unshare", "--net", "bash", "-c", _COUNT, "bash")
    return int(line.split(":")[1].split()[8])


def expected(model: growth.Model, engine: str, kind: str, processes: int, batch: int) -> float:
    """Bytes that a process sends in a step, by ``benchmarks.growth``."""
    others = growth.gather_bytes(batch, processes) + growth.statistics_bytes(model, processes)
    if engine == "fsdp":
        return growth.sharded_bytes(model, processes) + others
    number = (4 if engine == "ddp" else 6) if kind == "exact" else (8 if engine == "ddp" else 14)
    return growth.gradient_bytes(model, processes, number) + others


def table(options: argparse.Namespace) -> None:
    """Print a row an engine and kind of accumulation."""
    processes, batch = options.processes, options.batch
    model = growth.Model.of(options.arch, options.image_size)
    print(
        f"{processes} processes, batch {batch}, {options.arch} at {options.image_size} px, {model.parameters:,} "
        "parameters; MB a process and step\n"
    )
    print("| engine | accumulation | counted | expected | ratio |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):
            shards = write_shards(folder)
        kinds = [(engine, kind) for kind in ("exact", "bitwise") for engine in options.engines]
        for engine, kind in (one for one in kinds if one != ("fsdp", "bitwise")):
            counts = []
            for steps in (SHORT, LONG):
                job = argparse.Namespace(**{**vars(options), **JOB, "accumulation": kind, "steps": steps})
                counts.append(sent(Cell(engine, processes, 1), folder / f"{engine}-{kind}-{steps}", shards, job))
            each = (counts[1] - counts[0]) / (LONG - SHORT) / processes
            model_says = expected(model, engine, kind, processes, batch)
            print(
                f"| {engine} | {kind} | {each / 1e6:.1f} | {model_says / 1e6:.1f} | {each / model_says:.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image_size", type=int, default=32, help="side of the views")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if not available():
        raise SystemExit("network namespaces need root and iproute2")
    table(options)


if __name__ == "__main__":
    main()
