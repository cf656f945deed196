"""Finished steps of a job, found from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ca2cl.common.grid import Grid
from ca2cl.common.tables import fitted
from ca2cl.evaluation.finetune.trial import trial_grid
from ca2cl.evaluation.result import ENCODER
from ca2cl.reproduce import datasets as published
from ca2cl.reproduce.archives import part_of
from ca2cl.reproduce.config import JOBS, NctConfig, jobs
from ca2cl.reproduce.cost import MEASURED, measure
from ca2cl.reproduce.linear import linear_grid
from ca2cl.reproduce.report import RESULTS
from ca2cl.reproduce.vectors import embedded

DONE, TO_DO = "done", "to do"


def plan(config: NctConfig) -> str:
    """The job's steps as fitted text, each with what is done of it; nothing is written or asked for.

    Args:
        config: settled.
    """
    cost = measure(config)
    steps = [("tiles", name, cost.space(name), "", _tiles(config, name)) for name in config.sets]
    steps += [
        ("shards", str(config.shards(name)), cost.space(name), "", _done(published.sharded(config, name)))
        for name in config.sets
    ]
    if "linear" in config.tasks and config.protocol == "honest":
        steps += [("vectors", str(config.vectors(name)), *cost.vectors(name), _vectors(config, name))
                  for name in config.sets]  # fmt: skip
        steps.append(("linear cells", str(config.out / "linear"), "", "", _count(linear_grid(config))))
    for trains in jobs(config):
        assert config.seeds is not None
        grid = trial_grid(config.out / JOBS[trains], (ENCODER, *config.against), config.labels, config.seeds)
        title = "fine-tuning cells" if trains == "all" else "linear cells"
        time = cost.cells(trains, len(grid.missing()), len(grid)) if grid.missing() else ""
        steps.append((title, str(config.out / JOBS[trains]), "", time, _count(grid)))
    steps.append(("table", str(config.out / RESULTS), "", "", _done((config.out / RESULTS).exists())))
    return fitted(("step", "where", "space", "time", "state"), steps) + MEASURED.format(device=cost.device)


def _done(done: bool) -> str:
    return DONE if done else TO_DO


def _count(grid: Grid[Any]) -> str:
    of = len(grid)
    done = of - len(grid.missing())
    return f"{done} of {of} {DONE}" if done < of else f"all {of} {DONE}"


def _tiles(config: NctConfig, name: str) -> str:
    data = Path(config.data)
    if published.present(data, name):
        return "drawn" if published.made_up(data) else "there"
    if config.miniature:
        return "to be drawn"
    archive = published.archive_path(data, name)
    if not config.download:
        return "NOT THERE: use --download, or give the folder that holds it as data"
    if archive.exists():
        return "to be unpacked"
    part = part_of(archive)
    return f"to be fetched{f', {part.stat().st_size / 1e9:.2f} GB are here' if part.exists() else ''}"


def _vectors(config: NctConfig, name: str) -> str:
    path = config.vectors(name)
    parts = len(list(path.with_name(f"{path.name}.parts").glob("part-*.parquet")))
    return DONE if embedded(config, name) else f"{TO_DO}{f', {parts} parts are there' if parts else ''}"
