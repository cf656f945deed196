"""Bytes on the wire a step, by engine, counted by the kernel.

    python -m benchmarks.wire [--engines ddp zero1 zero2] [--processes 2] [--batch 64]     (as root)

Each job runs in a network namespace of its own, whose loopback carries nothing else; the bytes of a long run less those
of a short one, over the steps between them and the processes, are what one process sends in a step (TCP's headers
included). Beside it what ``benchmarks.growth`` expects, and the ratio of the two: 4 bytes a parameter all-reduced by
DDP; by DeepSpeed half as much again, for it gathers weights after the all-reduce; ``bitwise`` all-reduces 8 bytes by
itself, after which DDP has nothing to send, while DeepSpeed does what it always does.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import subprocess
import tempfile
from pathlib import Path

from benchmarks import growth
from benchmarks.jobs import ENGINES, Cell, train, write_shards

SHORT, LONG = 1, 5
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


def table(engines: list[str], processes: int, batch: int) -> None:
    """Print a row an engine and kind of accumulation."""
    options = argparse.Namespace(norm="lane_group", group=4, block=4, optimizer="sgd", lr=1e-3, batch=batch)
    model = growth.Model.of("resnet18")
    print(f"{processes} processes, batch {batch}, ResNet-18, {model.parameters:,} parameters; MB a process and step\n")
    print("| engine | accumulation | counted | expected | ratio |\n| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards = write_shards(folder)
        for engine, kind in [*((engine, "exact") for engine in engines), *((engine, "bitwise") for engine in engines)]:
            counts = []
            for steps in (SHORT, LONG):
                job = copy.copy(options)
                job.accumulation, job.steps = kind, steps
                counts.append(sent(Cell(engine, processes, 1), folder / f"{engine}-{kind}-{steps}", shards, job))
            each = (counts[1] - counts[0]) / (LONG - SHORT) / processes
            number = (4 if engine == "ddp" else 6) if kind == "exact" else (8 if engine == "ddp" else 14)
            expected = growth.gradient_bytes(model, processes, number)
            expected += growth.gather_bytes(batch, processes) + growth.statistics_bytes(model, processes)
            print(
                f"| {engine} | {kind} | {each / 1e6:.1f} | {expected / 1e6:.1f} | {each / expected:.2f} |", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if not available():
        raise SystemExit("network namespaces need root and iproute2")
    table(options.engines, options.processes, options.batch)


if __name__ == "__main__":
    main()
