"""``ca2cl doctor``: checks before training, and a sheet of views."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from ca2cl.common.console.summary import closing, going_on
from ca2cl.config import ViewsConfig
from ca2cl.doctor.config import DoctorConfig
from ca2cl.runtime.launched import find_place

_ANY = "RECIPE"
"""Stands in the next commands for a recipe that the user chooses."""


def run(config: DoctorConfig) -> int:
    """Print what was found, or write the sheet; returns 0, or 1 when something is wrong."""
    if config.leaks:
        from ca2cl.doctor.leaks.run import compare

        if find_place().rank != 0:
            return 0
        return compare(config.leaks, config.leaks_output, workers=config.workers, cache_dir=config.cache_dir)
    return _sheet(config, *config.views) if config.views else _examine(config)


def _sheet(config: DoctorConfig, shards: str, out: str) -> int:
    from ca2cl.views.contact_sheet import run_sheet

    views = ViewsConfig(recipe=config.recipe, strength=config.strength, crop_scale=config.crop_scale)
    path = run_sheet(shards, out, count=config.count, config=views, image_size=config.image_size)
    sys.stdout.write(f"views of {config.count} tiles in {path}\n")
    recipe = config.pretrain_recipe or _ANY
    train = ["ca2cl", "pretrain", "--recipe", recipe, "--data.shards", shards, "--run.output_dir", "runs/first"]
    sys.stdout.write(closing("a sheet of views", path, train))
    return 0


def _examine(config: DoctorConfig) -> int:
    from ca2cl.doctor.finding import Finding, shown
    from ca2cl.doctor.job import job
    from ca2cl.doctor.launch import meet
    from ca2cl.doctor.machine import machine

    rank, ranks = meet(config.patience)
    if rank != 0:
        return 0
    plan = replace(config, processes=len(ranks) - 1 if ranks else config.processes)
    planned = job(plan, config.shards) if config.shards else ()
    wrong = False

    def found() -> Iterator[Finding]:
        nonlocal wrong
        for one in chain(machine(config.tracking_uri, config.tracking_root), ranks, planned):
            wrong = wrong or one.state == "wrong"
            yield one

    for text in shown(found()):
        sys.stdout.write(text)
        sys.stdout.flush()
    if config.shards and not wrong:
        recipe = config.pretrain_recipe or _ANY
        train = ["ca2cl", "pretrain", "--recipe", recipe, "--data.shards", config.shards]
        look = ["ca2cl", "doctor", "--views", config.shards, "views.png", "--recipe", recipe]
        sys.stdout.write(going_on(look, [*train, "--run.output_dir", "runs/first"]))
    elif not config.shards:
        sys.stdout.write(going_on(["ca2cl", "doctor", "--shards", "SHARDS"]))
    return 1 if wrong else 0
