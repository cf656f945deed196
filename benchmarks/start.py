"""A job of one step, in this checkout and another one in turn: CPU seconds to the first step and to the end.

    git worktree add ../before f1aef52
    python -m benchmarks.start ../before [--launchers accelerate ca2cl none] [--repeats 3]

The job is ``pretrain --recipe smoke --run.steps 1`` with a new MLflow store, which registers its encoder. The first
step is over when its line is in the journal; the CPU seconds are then those of the launcher and the job together. The
cost of each launcher alone is measured with a child that does nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.checkouts import HERE, Cost, children_cpu, environment, in_turn, python, run, table
from benchmarks.jobs import write_shards

_LAUNCH = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
LAUNCHERS = {
    "accelerate": ("-m", "accelerate.commands.accelerate_cli", "launch", *_LAUNCH),
    "ca2cl": ("-m", "ca2cl", "launch", *_LAUNCH),
    "none": (),
}
_EVERY_S = 0.02


def _has_step(journal: Path) -> bool:
    if not journal.exists():
        return False
    return any("step" in json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}"))


def _cpu(process: psutil.Process) -> float:
    """CPU seconds of a process and of all below it, ended ones included."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def one_step(launcher: Sequence[str], checkout: Path, shards: Path, scratch: Path) -> Mapping[str, Cost]:
    """Cost of a job of one step: to its first step, and in all.

    Raises:
        SystemExit: with the job's own words where it fails.
    """
    folder = scratch / "job"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    job = ("-m", "ca2cl", "pretrain", "--recipe", "smoke", "--data.shards", str(shards), "--run.steps", "1")
    command = python(*launcher, *job, "--run.output_dir", "run")
    used, began, first = children_cpu(), time.perf_counter(), None
    with (folder / "output").open("w") as output:
        process = psutil.Popen(command, cwd=folder, env=environment(checkout), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if first is None and _has_step(folder / "run" / "journal.jsonl"):
                first = Cost(_cpu(process), time.perf_counter() - began)
            time.sleep(_EVERY_S)
    if process.returncode or first is None:
        raise SystemExit(f"{checkout} failed:\n{(folder / 'output').read_text()[-3000:]}")
    return {"to the first step": first, "all": Cost(children_cpu() - used, time.perf_counter() - began)}


def nothing(launcher: Sequence[str], checkout: Path, scratch: Path) -> Cost:
    """Cost of a launcher alone."""
    return run(python(*launcher, "-m", "this"), checkout, scratch)[0]


def main() -> None:
    """Make shards, and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("before", type=Path, help="checkout to compare with")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=list(LAUNCHERS), help="ways to start it")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each checkout")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        shards = write_shards(scratch)
        for name in settings.launchers:
            launcher = LAUNCHERS[name]

            def measured(_name: str, checkout: Path, launcher: Sequence[str] = launcher) -> Mapping[str, Cost]:
                alone = {"the launcher alone": nothing(launcher, checkout, scratch)} if launcher else {}
                return {**alone, **one_step(launcher, checkout, shards, scratch)}

            found = in_turn({"before": settings.before, "after": HERE}, measured, settings.repeats)
            print(table(f"launcher: {name}", found), flush=True)


if __name__ == "__main__":
    main()
