"""Compute of finished runs: steps, minutes, CPU or GPU hours."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ca2cl.study.jobs import Job
from ca2cl.study.timing import Clock, read_times


@dataclass(frozen=True)
class Compute:
    """Compute of one run. Its probe, start and checkpoints are not in it, but for checkpoints on a GPU."""

    recipe: str
    seed: int
    steps: int
    clock: Clock
    minutes: float
    """Training time by ``clock``."""
    wall_minutes: float
    cpu_hours: float
    """Of the training processes, decoding processes aside; rank 0's times their number."""
    gpu_hours: float
    """Wall time times GPUs in use; 0 on CPUs."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def read_compute(job: Job) -> Compute:
    """The compute of a finished run.

    Raises:
        InputError: its journal has no times.
    """
    times = read_times(job.folder)
    lines = len(times.wall)  # fewer than steps where run.log_every is not 1
    factor = job.steps / lines if times.clock == "cpu" else 1.0
    wall = sum(times.wall) * (1.0 if times.clock == "wall" else factor)
    return Compute(
        recipe=job.recipe,
        seed=job.seed,
        steps=job.steps,
        clock=times.clock,
        minutes=sum(times.seconds) * factor / 60,
        wall_minutes=wall / 60,
        cpu_hours=sum(times.cpu) * (job.steps / lines) * times.processes / 3600,
        gpu_hours=wall * times.processes / 3600 if times.clock == "wall" else 0.0,
    )


def compute_rows(found: Sequence[Compute], planned: float | None) -> list[tuple[str, ...]]:
    """Cells of a table with one row a recipe, under ``COMPUTE_HEADS``."""
    rows: list[tuple[str, ...]] = []
    for recipe in dict.fromkeys(one.recipe for one in found):
        runs = [one for one in found if one.recipe == recipe]
        minutes = [one.minutes for one in runs]
        gpu = sum(one.gpu_hours for one in runs)
        hours = f"{gpu:.3g} GPU h" if gpu else f"{sum(one.cpu_hours for one in runs):.3g} CPU h"
        rows.append((
            recipe, str(len(runs)), str(runs[0].steps), f"{planned:g}" if planned else "-",
            f"{statistics.mean(minutes):.2f} ({min(minutes):.2f} to {max(minutes):.2f})",
            f"{statistics.mean(one.wall_minutes for one in runs):.2f}", hours,
        ))  # fmt: skip
    return rows


COMPUTE_HEADS = ("recipe", "runs", "steps", "planned min", "measured min", "wall min", "all runs")
_CLOCKS = {
    "cpu": "minutes: CPU time of the optimizer steps, divided by the threads of the process; other programs of the "
    "machine hardly change it, as they do wall time",
    "wall": "minutes: wall time from step to step, checkpoints included, breaks between two starts not",
}


def describe_clock(found: Sequence[Compute]) -> str:
    """What the minutes are."""
    return "\n".join(_CLOCKS[clock] for clock in dict.fromkeys(one.clock for one in found))
