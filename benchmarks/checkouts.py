"""Commands of two checkouts, run in turn in one environment, with the CPU seconds of all their processes."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of a command, or of its part up to some moment."""

    cpu: float
    wall: float


def run(command: Sequence[str], checkout: Path, folder: Path) -> tuple[Cost, str]:
    """Run a command with a checkout's ``ca2cl`` in front of the environment's; returns its cost and what it printed.

    Raises:
        SystemExit: with the command's own words where it fails.
    """
    used, began = children_cpu(), time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(checkout), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed in {checkout}:\n{done.stderr[-3000:]}")
    return Cost(children_cpu() - used, time.perf_counter() - began), done.stdout


def environment(checkout: Path) -> dict[str, str]:
    """The environment of a command that imports a checkout's ``ca2cl``."""
    here = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    here.pop("MLFLOW_TRACKING_URI", None)
    return here


def children_cpu() -> float:
    """CPU seconds of all child processes that have ended, and of theirs."""
    times = os.times()
    return times.children_user + times.children_system


def in_turn(
    checkouts: Mapping[str, Path], measured: Callable[[str, Path], Mapping[str, Cost]], repeats: int
) -> dict[str, dict[str, Cost]]:
    """Medians of what ``measured`` finds, by name and phase, over rounds in which each checkout has its turn.

    The first round is not counted: it reads files into the page cache, and compiles.
    """
    rounds = [{name: measured(name, path) for name, path in checkouts.items()} for _ in range(repeats + 1)][1:]
    return {
        name: {
            phase: Cost(
                statistics.median(found[name][phase].cpu for found in rounds),
                statistics.median(found[name][phase].wall for found in rounds),
            )
            for phase in rounds[0][name]
        }
        for name in checkouts
    }


def table(title: str, medians: Mapping[str, Mapping[str, Cost]]) -> str:
    """One line a phase: CPU seconds of both checkouts, their ratio, and the same in wall seconds."""
    before, after = medians["before"], medians["after"]
    lines = [
        f"{title:34} {'CPU s before':>12} {'after':>7} {'ratio':>6}   {'wall s before':>13} {'after':>7} {'ratio':>6}"
    ]
    for phase in before:
        old, new = before[phase], after[phase]
        lines.append(
            f"  {phase:32} {old.cpu:12.2f} {new.cpu:7.2f} {_ratio(old.cpu, new.cpu)}   "
            f"{old.wall:13.2f} {new.wall:7.2f} {_ratio(old.wall, new.wall)}"
        )
    return "\n".join(lines)


def _ratio(before: float, after: float) -> str:
    return f"{before / after:6.2f}" if after > 0 else f"{'-':>6}"


def python(*words: str) -> list[str]:
    """A command of this environment's interpreter."""
    return [sys.executable, *words]
