"""``ca2cl study``: train and probe recipes x seeds, and compare them."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ca2cl.common.locks import Locked, exclusive_lock
from ca2cl.common.tables import fitted
from ca2cl.errors import InputError
from ca2cl.runtime.launched import forget_place
from ca2cl.study.children import Children, Stopped
from ca2cl.study.config import StudyConfig
from ca2cl.study.jobs import Job, all_jobs, pretrain_command, probe_command, probe_results, progress
from ca2cl.study.plan import Plan, find_plan, make_plan
from ca2cl.study.recipes import Study, read_study

logger = logging.getLogger(__name__)
_WAIT_S = 120.0
"""Seconds that ``--job`` waits for another process to leave its job."""
_BAD_INPUT = 2
_POLL_S = 2.0


def run(config: StudyConfig) -> int:
    """Do what is left of a study and write its table. Returns the exit code: 0, 85 after a signal, 130 after Ctrl-C.

    Raises:
        InputError: the study's file, the data or the folder cannot be used.
    """
    study = read_study(config)
    if config.list:
        sys.stdout.write(_listed(study, config))
        return 0
    forget_place()
    children = Children().install()
    try:
        return _run(study, config, children)
    except Stopped as stopped:
        logger.warning("stopped by a signal; finished jobs and checkpoints are kept, and the same command goes on")
        return stopped.code


def _run(study: Study, config: StudyConfig, children: Children) -> int:
    plan = make_plan(study, config, children)
    if config.plan:
        sys.stdout.write(_listed(study, config))
        return 0
    jobs = plan.jobs
    if config.job is not None and config.job >= len(jobs):
        raise InputError(f"job is {config.job}: the study has {len(jobs)} jobs, 0 to {len(jobs) - 1}")
    failed = 0
    if not config.table:
        failed = _Worker(plan, config, children).work(jobs if config.job is None else [jobs[config.job]])
    left = [job for job in jobs if not job.done()]
    if left:
        sys.stdout.write(_listed(study, config))
    if config.table or (len(left) < len(jobs) if config.job is None else not left):
        from ca2cl.study.report import report  # torch and MLflow

        report(plan, config)
    return failed


def _listed(study: Study, config: StudyConfig) -> str:
    plan = find_plan(study, config)
    steps = plan.steps if plan is not None else dict.fromkeys(study.recipes, study.steps or 0)
    jobs = plan.jobs if plan is not None else all_jobs(Path(config.output_dir), steps, study.seeds)
    rows = [(str(job.number), job.recipe, str(job.seed), str(job.steps or "?"), job.state()) for job in jobs]
    return fitted(("job", "recipe", "seed", "steps", "state"), rows)


class _Worker:
    """Works through jobs, one after another."""

    def __init__(self, plan: Plan, config: StudyConfig, children: Children) -> None:
        self._plan, self._config, self._children = plan, config, children
        self._took: list[float] = []
        self._said = False

    def work(self, jobs: Sequence[Job]) -> int:
        """Do what is left of the jobs; 0, or the exit code of the first one that failed.

        A job that another process works on is left for the end, and then waited for.
        """
        wait = _WAIT_S if self._config.job is not None else 0.0
        waiting = f"another process works on the job; waiting for it, {wait:.0f} s at most"
        left, failed = [job for job in jobs if not job.done()], 0
        while left:
            job, busy = left.pop(0), False
            try:
                with exclusive_lock(job.lock, wait, waiting=waiting):
                    code = 0 if job.done() else self._do(job, 1 + len(left))
            except Locked as holder:
                busy, code = True, 0
                if self._config.job is not None:
                    raise InputError(f"job {job.number}: another process works on it; wait for it{holder}") from None
            if busy:
                left.append(job)
                self._pause(left)
            elif code:
                logger.error("job %d, %s: failed with exit code %d", job.number, job.name, code)
                failed = failed or code
                if code == _BAD_INPUT and not progress(job.folder)[0]:  # as the next one would
                    break
        return failed

    def _do(self, job: Job, left: int) -> int:
        """Train and probe; the exit code."""
        started = time.monotonic()
        minutes = self._time_left(left)
        of = len(self._plan.jobs)
        logger.info("job %d of %d, %s: %d steps%s", job.number + 1, of, job.name, job.steps, minutes)
        study, config = self._plan.study, self._config
        if not job.trained() and (code := self._children.run(pretrain_command(job, study.shards, config, study.name))):
            return code
        code = self._children.run(probe_command(job, study.probe, config, study.name))
        if code and probe_results(job.probe) is not None:
            logger.warning("%s: probed, but not logged in MLflow", job.name)
            code = 0
        self._took.append(time.monotonic() - started)
        return code

    def _time_left(self, left: int) -> str:
        """The time that the jobs left will take, as far as it is known."""
        planned = (self._plan.study.minutes or 0.0) * 60
        seconds = sum(self._took) / len(self._took) if self._took else planned
        return f"; {left} to do, about {seconds * left / 60:.0f} minutes" if seconds else f"; {left} to do"

    def _pause(self, left: Sequence[Job]) -> None:
        """Wait a little where other processes work on all jobs that are left."""
        if not any(_free(job) for job in left):
            if not self._said:
                logger.info("other processes work on the last %d jobs: waiting for them", len(left))
                self._said = True
            time.sleep(_POLL_S)
            self._children.check()


def _free(job: Job) -> bool:
    try:
        with exclusive_lock(job.lock, 0.0):
            return True
    except Locked:
        return False
