"""``ca2cl reproduce nct``: the authors' tables on NCT-CRC-HE beside ours.

The first process draws, fetches and shards; all share the encoder's work, the linear cells and the fine-tuning. What a
step has finished is a file, written whole or not at all, and no step looks at anything else: so it does not matter
where an earlier start ended, or how.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from ca2cl.common.console.summary import as_part
from ca2cl.common.job_dir import JobDir, job_record
from ca2cl.config import flatten
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import check_every_class
from ca2cl.evaluation.finetune import run as finetune
from ca2cl.models.encoder_io import weights_digest
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.reproduce import datasets as published
from ca2cl.reproduce.config import NctConfig, jobs, settled, tuning
from ca2cl.reproduce.data_summary import find_facts, open_sets
from ca2cl.reproduce.linear import linear_grid, run_trials
from ca2cl.reproduce.report import protocol_tag, report
from ca2cl.reproduce.steps import plan
from ca2cl.reproduce.vectors import make_vectors, read_vectors
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.launched import find_place, under_deepspeed
from ca2cl.runtime.signals import EXIT_PREEMPTED, StopFlag

_FREE = ("tracking.", "output_dir", "workers", "plan", "download", "record_url", "tasks", "data")
"""Settings that may change from one start to the next; where the tiles are is compared as a path."""


class Preempted(BaseException):
    """A signal asked for an end. Not an Exception: nobody is to take it for an error of theirs."""


class Preemption(StopFlag):
    """Ends whatever runs at the first signal, by ``Preempted``: for steps that lose little to a kill."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.raised
        super()._on_signal(number, frame)
        if first:
            raise Preempted


def job_dir(out: Path) -> JobDir:
    """The folder as a job's."""
    return JobDir(out, "reproduce.json", temporaries=("", "linear"))


def run(config: NctConfig) -> int:
    """Fill the tables as far as they are not, print them, log the MLflow run. Returns the exit code: 0, or 85 after a
    signal, when the same command goes on.

    Raises:
        InputError: no tiles, an unknown encoder, a folder that holds another job, a failed download, a full disk.
    """
    config = settled(config)
    if config.plan:
        job_dir(config.out).check(job_record(_settings(config)))
        sys.stdout.write(plan(config))
        return 0
    if under_deepspeed():
        raise InputError("reproduce does not run under DeepSpeed: its cells are small jobs; use a DDP configuration")
    stop = Preemption().install()
    try:
        return _run(config, stop)
    except Preempted:
        return EXIT_PREEMPTED
    except InputError:
        if stop.raised:  # of a worker or another rank that the same signal ended
            return EXIT_PREEMPTED
        raise


def _run(config: NctConfig, stop: StopFlag) -> int:
    tuned = jobs(config)
    if tuned and find_place().world > 1:
        build_accelerator()  # before the ranks meet otherwise: its process group is the one that trains
    ranks = Ranks()
    ranks.from_first(lambda: published.check_present(config))
    found = ranks.together(lambda: _resolve(config))
    whose = {**_settings(config), "encoder_weights": weights_digest(found.encoder, found.card.mean, found.card.std)}
    with ExitStack() as held:
        with as_part():
            facts = ranks.from_first(lambda: _begin(config, whose, found, held))
            if "linear" in config.tasks and "head" not in tuned:
                _linear(config, ranks)
            for trains in tuned:
                # whatever its files look like: what is done and what is logged of it, it knows best
                job = replace(tuning(config, trains), note_protocol=protocol_tag(config))
                code = finetune.run(job) if trains == tuned[-1] else finetune.run(job, last=False)
                if code:
                    return code
                stop.install()  # fine-tuning had its own
        if ranks.rank == 0:
            report(config, found, facts)
    return 0


def _settings(config: NctConfig) -> dict[str, Any]:
    kept = {name: value for name, value in flatten(config).items() if not name.startswith(_FREE)}
    return {**kept, "data": os.path.realpath(config.data)}


def _resolve(config: NctConfig) -> ResolvedEncoder:
    return resolve_encoder(config.encoder, tracking_uri=config.tracking.uri, root=config.tracking.root)


def _begin(config: NctConfig, whose: dict[str, Any], found: ResolvedEncoder, held: ExitStack) -> dict[str, Any]:
    """The first process's part: claim the folder, provide tiles and shards; what they are."""
    job, record = job_dir(config.out), job_record(whose)
    if not job.begin(record, held, timeout=0.0):
        job.write(record)
    published.provide(config)
    published.make_shards(config)
    return find_facts(config, found)


def _linear(config: NctConfig, ranks: Ranks) -> None:
    """The linear trials, dealt to the ranks. Every rank calls it."""
    trials = ranks.from_first(linear_grid(config).missing)
    if not trials:
        return
    make_vectors(config, ranks)

    def work() -> None:
        indexes = open_sets(config)
        train, test = (
            read_vectors(config.vectors(name), index) for name, index in zip(config.sets, indexes, strict=True)
        )
        check_every_class(str(config.vectors(config.train_set)), train.labels_N, indexes[0].classes)
        run_trials(config, trials[ranks.rank :: ranks.world], train, test, shown=ranks.rank == 0)

    ranks.together(work)
