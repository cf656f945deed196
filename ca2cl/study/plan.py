"""``study.json``: the study's settings, data and steps, fixed once."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ca2cl import __version__
from ca2cl.common.files import write_atomic
from ca2cl.common.job_dir import REMEDY, JobDir, job_record
from ca2cl.common.records import read_fields
from ca2cl.config import flatten, to_dict
from ca2cl.data.remote.reader import open_index
from ca2cl.errors import InputError
from ca2cl.study.children import Children
from ca2cl.study.config import StudyConfig
from ca2cl.study.jobs import SETTINGS, Job, all_jobs
from ca2cl.study.recipes import Study
from ca2cl.study.timing import time_recipes

logger = logging.getLogger(__name__)
RECORD = "study.json"
_WAIT_S = 3600.0
"""Seconds that a job of an array waits for another one that times the recipes."""
_LEFT_OUT = ("data.shards", "data.cache_dir", "run.output_dir", "run.seed", "run.steps", "run.epochs", "tracking.")
_PLACES = ("encoder", "train", "test", "cache_dir", "output", "against", "tracking.")
"""Settings of a probe that are places, or none of the study's."""


@dataclass(frozen=True)
class Plan:
    """A study whose steps are fixed."""

    study: Study
    out: Path
    steps: dict[str, int]
    """Of every recipe."""
    timing: dict[str, dict[str, Any]]
    """Measured times of every recipe; empty where the file gives the steps."""

    @property
    def jobs(self) -> list[Job]:
        """All jobs in order."""
        return all_jobs(self.out, self.steps, self.study.seeds)


def job_dir(out: Path) -> JobDir:
    """The folder as a study's."""
    return JobDir(out, RECORD)


def make_plan(study: Study, config: StudyConfig, children: Children) -> Plan:
    """The plan of a study: the one that is there, or else a new one, for which the recipes are timed.

    Raises:
        InputError: the folder holds another study, or cannot be written; a recipe cannot be trained.
        Stopped: a signal came.
    """
    out, record = Path(config.output_dir), _record(study)
    if (plan := find_plan(study, config)) is not None:
        return plan
    with ExitStack() as held:
        if job_dir(out).begin(record, held, timeout=_WAIT_S):
            return _read(study, out)
        for name, recipe in study.recipes.items():
            _write_settings(out / name, to_dict(recipe))
        timing = {}
        if study.minutes is not None:
            timing = time_recipes(list(study.recipes), out, study.shards, config, children)
        steps = {name: _steps(name, study, timing) for name in study.recipes}
        job_dir(out).write({**record, "steps": steps, "timing": timing})
        for name, count in steps.items():
            logger.info("%s: %d steps%s", name, count, _priced(timing.get(name)))
        return Plan(study, out, steps, timing)


def find_plan(study: Study, config: StudyConfig) -> Plan | None:
    """The plan that is in the folder; None where there is none yet.

    Raises:
        InputError: the folder holds another study.
    """
    out = Path(config.output_dir)
    return _read(study, out) if job_dir(out).check(_record(study)) else None


def _read(study: Study, out: Path) -> Plan:
    fields = read_fields(out / RECORD, ("steps", "timing"), "restore it, or use another output_dir")
    return Plan(study, out, dict(fields["steps"]), dict(fields["timing"]))


def _record(study: Study) -> dict[str, Any]:
    """What the folder is known by. More seeds may be asked for later."""
    settings: dict[str, Any] = {"minutes": study.minutes, "steps": study.steps, "recipes": " ".join(study.recipes)}
    for name, recipe in study.recipes.items():
        settings |= {f"{name}: {key}": value for key, value in flatten(recipe).items() if not key.startswith(_LEFT_OUT)}
    probe = {key: value for key, value in flatten(study.probe).items() if not key.startswith(_PLACES)}
    settings |= {f"probe.{key}": value for key, value in probe.items()}
    caches = [recipe.data.cache_dir for recipe in study.recipes.values()]
    settings["data.shards"] = open_index(study.shards, caches[0]).manifest.digest
    settings["probe.train"] = open_index(study.probe.train, study.probe.cache_dir).manifest.digest
    tests = [open_index(test, study.probe.cache_dir).manifest.digest for test in study.probe.tests]
    settings["probe.test"] = " ".join(tests)
    return job_record(settings, schema_version=1, kind="study", ca2cl=__version__)


def _write_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write a recipe's settings, all of them, for its jobs and for whoever repeats one by hand."""
    del settings["tracking"]
    settings["data"] = {name: value for name, value in settings["data"].items() if name != "shards"}
    for name in ("output_dir", "seed", "steps", "epochs"):
        del settings["run"][name]
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / SETTINGS, yaml.safe_dump(_plain(settings), sort_keys=False).encode(), REMEDY)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def _steps(name: str, study: Study, timing: dict[str, dict[str, Any]]) -> int:
    if study.minutes is None:
        assert study.steps is not None
        return study.steps
    seconds = timing[name]["seconds_a_step"]
    steps = int(study.minutes * 60 / seconds)
    if steps < 1:
        raise InputError(f"minutes is {study.minutes:g}: a step of {name} takes {seconds:.1f} s; give more minutes")
    return steps


def _priced(timing: dict[str, Any] | None) -> str:
    if timing is None:
        return ""
    of = "CPU s on each thread" if timing["clock"] == "cpu" else "s"
    return f" of {timing['seconds_a_step']:.3g} {of}"
