"""Time the steps of recipes, and of finished runs."""

from __future__ import annotations

import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ca2cl.common.files import writing
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError
from ca2cl.store.databases import sqlite_uri
from ca2cl.store.open import ARTIFACTS
from ca2cl.study.children import Children
from ca2cl.study.config import StudyConfig
from ca2cl.study.jobs import launcher, training_flags
from ca2cl.tracking.journal import JOURNAL_NAME, read_journal

logger = logging.getLogger(__name__)
TURNS, WARM_UP, TIMED = 2, 2, 6
"""Turns of every recipe; steps of a turn that do not count, and that do."""
Clock = Literal["cpu", "wall"]


@dataclass(frozen=True)
class Times:
    """Seconds of a run's optimizer steps."""

    clock: Clock
    """cpu: CPU time of the training process divided by its threads, which other programs of the machine hardly
    change. wall: time between steps, for GPUs."""
    cpu: list[float]
    """CPU seconds of every step."""
    wall: list[float]
    """Wall seconds of every step, up to the next one."""
    threads: int
    processes: int
    gpus: int

    @property
    def seconds(self) -> list[float]:
        """Seconds of every step by ``clock``."""
        return self.wall if self.clock == "wall" else [cpu / self.threads for cpu in self.cpu]


def read_times(folder: Path, skip: int = 0) -> Times:
    """The times in a run's journal, without the first ``skip`` steps. Breaks between two starts do not count.

    Raises:
        InputError: the run was not made by this version, and its journal has no times.
    """
    cpu, wall, before = [], [], None
    for record, _ in read_journal(folder / JOURNAL_NAME):
        if record.get("event") == "status":
            before = None  # of the start before
        if "event" in record:
            continue
        alone = record["samples"] / record["step"] / record["tiles_per_s"]
        wall.append(record["time"] - before if before is not None else alone)
        cpu.append(record.get("cpu_s", 0.0))
        before = record["time"]
    machine = parse_json((folder / "environment.json").read_text(encoding="utf-8"))
    if "threads" not in machine or not wall:
        raise InputError(f"{folder}: its journal has no times; use another output_dir")
    return Times(
        clock="wall" if machine["device"] == "cuda" else "cpu", cpu=cpu[skip:], wall=wall[skip:],
        threads=machine["threads"], processes=machine["processes"], gpus=len(machine["gpus"]),
    )  # fmt: skip


def time_recipes(
    names: Sequence[str], out: Path, shards: str, config: StudyConfig, children: Children
) -> dict[str, dict[str, Any]]:
    """Time every recipe in turns; the measured seconds of each, and their median.

    Raises:
        InputError: a recipe cannot be trained.
        Stopped: a signal came.
    """
    scratch = out / ".timing"
    shutil.rmtree(scratch, ignore_errors=True)
    with writing(scratch, "give a folder you can write"):
        (scratch / ARTIFACTS).mkdir(parents=True)  # which makes it an embedded store
    found: dict[str, list[Times]] = {name: [] for name in names}
    for turn in range(TURNS):
        for name in names:
            logger.info("timing %s, turn %d of %d: %d steps", name, turn + 1, TURNS, WARM_UP + TIMED)
            folder = scratch / f"{name}-{turn}"
            command = [
                *launcher(config), "-m", "ca2cl", "pretrain", *training_flags(out / name, shards),
                f"--run.steps={WARM_UP + TIMED}", f"--run.output_dir={folder}", "--run.log_every=1",
                "--run.figures_every=0", f"--tracking.uri={sqlite_uri(scratch.resolve() / 'mlflow.db')}",
                "--tracking.register_as=none",
            ]  # fmt: skip
            if code := children.run(command):
                raise InputError(f"recipe {name} cannot be trained (exit code {code}, see above); correct the study")
            found[name].append(read_times(folder, WARM_UP))
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(scratch, ignore_errors=True)
    return {name: _summary(times) for name, times in found.items()}


def _summary(turns: Sequence[Times]) -> dict[str, Any]:
    seconds = [second for times in turns for second in times.seconds]
    merged = {name: value for name, value in asdict(turns[0]).items() if name not in ("cpu", "wall")}
    return {
        **merged,
        "seconds_a_step": statistics.median(seconds),
        "cpu_s": [second for times in turns for second in times.cpu],
        "wall_s": [second for times in turns for second in times.wall],
    }
