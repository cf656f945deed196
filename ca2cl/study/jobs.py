"""Jobs of a study: folders, commands, states."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.study.config import StudyConfig
from ca2cl.tracking.journal import JOURNAL_NAME, read_journal

PROBE, SETTINGS = "probe.json", "pretrain.yaml"
DONE, TRAINED, TO_DO = "done", "trained, to be probed", "to do"
_DECIDED = ("encoder", "against", "output", "protocol", "test", "floors", "imagenet", "tracking")
"""Settings of a probe that are not the study's, or that differ between its jobs."""


@dataclass(frozen=True)
class Job:
    """One training with its probe."""

    number: int
    recipe: str
    seed: int
    steps: int
    out: Path
    """The study's folder."""

    @property
    def name(self) -> str:
        """Name in logs, and of the MLflow run."""
        return f"{self.recipe} seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.out / self.recipe / f"seed-{self.seed}"

    @property
    def lock(self) -> Path:
        """File whose lock a process has while it works on the job."""
        return self.out / self.recipe / f".seed-{self.seed}.lock"

    @property
    def probe(self) -> Path:
        """JSON of the probe."""
        return self.folder / PROBE

    def trained(self) -> bool:
        """True if the run has done all its steps and written its encoder."""
        step, status = progress(self.folder)
        return step == self.steps and status == "FINISHED" and (self.folder / "encoder").is_dir()

    def done(self) -> bool:
        """True if the encoder is probed, too."""
        return probe_results(self.probe) is not None and self.trained()

    def state(self) -> str:
        """The job's state in a few words."""
        if self.trained():
            return DONE if self.done() else TRAINED
        step, _ = progress(self.folder)
        return f"step {step} of {self.steps}" if step else TO_DO


def all_jobs(out: Path, steps: dict[str, int], seeds: int) -> list[Job]:
    """The jobs in order: every recipe with seed 0, then every recipe with seed 1.

    In this order slow changes of the machine meet all recipes alike, and more seeds come last.
    """
    pairs = [(seed, recipe) for seed in range(seeds) for recipe in steps]
    return [Job(number, recipe, seed, steps[recipe], out) for number, (seed, recipe) in enumerate(pairs)]


def progress(folder: Path) -> tuple[int, str]:
    """The last step in a run's journal, and its last status; 0 and empty where there is none."""
    step, status, path = 0, "", folder / JOURNAL_NAME
    for record, _ in read_journal(path) if path.exists() else ():
        if "event" not in record:
            step = int(record.get("step", 0))
        elif record["event"] == "status":
            status = str(record.get("status", ""))
    return step, status


def probe_results(path: Path) -> dict[str, Any] | None:
    """The content of a probe's JSON; None where it is not there or damaged: it is made again."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
        return content if content["kind"] == "probe" and content["tests"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def pretrain_command(job: Job, shards: str, config: StudyConfig, name: str) -> list[str]:
    """The command that trains a job's encoder."""
    return [
        *launcher(config), "-m", "ca2cl", "pretrain", *training_flags(job.out / job.recipe, shards),
        "--run.steps", str(job.steps), "--run.seed", str(job.seed), "--run.output_dir", str(job.folder),
        *tracking_flags(config, f"{name}: {job.name}"),
        f"--tracking.register_as={config.tracking.register_as or 'none'}",
    ]  # fmt: skip


def training_flags(folder: Path, shards: str) -> list[str]:
    """Flags of a recipe: its settings as they are frozen in ``folder``, and the data."""
    return ["--config", str(folder / SETTINGS), "--data.shards", shards, "--run.epochs", "none"]


def probe_command(job: Job, probe: ProbeConfig, config: StudyConfig, name: str) -> list[str]:
    """The command that probes a job's encoder; that of the first job probes the floors, too."""
    words: list[str] = []
    for setting in (one.name for one in fields(probe) if one.name not in _DECIDED):
        value = getattr(probe, setting)
        several = isinstance(value, tuple)
        words += [f"--{setting}", *map(str, value)] if several else [f"--{setting}={_none(value)}"]
    floors = probe.floors and job.number == 0
    return [
        sys.executable, "-m", "ca2cl", "probe", "--encoder", str(job.folder), "--test", *probe.tests, *words,
        f"--floors={str(floors).lower()}", f"--imagenet={str(probe.imagenet).lower()}", "--output", str(job.probe),
        *tracking_flags(config, f"{name}: probe of {job.name}"),
    ]  # fmt: skip


def launcher(config: StudyConfig) -> Sequence[str]:
    """Words that start the processes of a training."""
    words = shlex.split(config.launcher)
    if words[:1] == ["ca2cl"]:  # whether or not the environment's programs are on the path
        return [sys.executable, "-m", *words]
    return words or [sys.executable]


def tracking_flags(config: StudyConfig, run_name: str) -> list[str]:
    """Flags of the store and the run's name."""
    tracking = config.tracking
    return [
        *([f"--tracking.uri={tracking.uri}"] if tracking.uri else []), f"--tracking.root={tracking.root}",
        f"--tracking.experiment={tracking.experiment}", f"--tracking.run_name={run_name}",
        *(["--tracking.sinks", *tracking.sinks] if tracking.sinks else []),
    ]  # fmt: skip


def _none(value: Any) -> str:
    return "none" if value is None else str(value)
