"""Training loop: fetch, step, journal, checkpoint, stop."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.runtime.signals import GivenUp, StopFlag
from ca2cl.training.checkpoint import Checkpointer, read_state
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.readings import Reading
from ca2cl.training.within_step import StepExit, step_exit

logger = logging.getLogger(__name__)


class StepData(Protocol):
    """One optimizer step's share of this rank."""

    @property
    def epoch(self) -> int:
        """Pass over the data, from 0."""

    @property
    def bad(self) -> list[Any]:
        """Tiles of this rank's share that had to be replaced, each with ``key`` and ``reason``."""

    @property
    def micro_batches(self) -> Sequence[Any]:
        """Inputs of ``Method.step``, each made on access."""


class Method(Protocol):
    """Computes a step's gradient; a subclass need only define ``step``."""

    @property
    def counters(self) -> Collection[str]:
        """Names of terms that are counts, added up over the run in ``Progress.counts`` and the journal."""
        return ()

    def step(self, engine: Any, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        """Accumulate the gradient; return the step's terms, ``loss`` among them, the same on every rank."""

    def after_step(self, network: Any, step: int, total_steps: int) -> None:
        """An optimizer step was done, the ``step``-th; not called after one that was left out."""
        return


class Observer(Protocol):
    """Receives the training loop's events; on ranks other than 0 it may ignore them."""

    def log_step(self, record: dict[str, Any]) -> None:
        """A journal line."""

    def log_bad(self, step: int, tiles: Sequence[Any]) -> None:
        """Tiles of all ranks that were replaced in ``step``."""

    def after_epoch(self, epoch: int, engine: AccelerateEngine) -> bool | None:
        """An epoch has ended. Every rank calls it; True on every rank ends the training here, as done."""


class Watch(Protocol):
    """Looks at the network now and then, and changes nothing of it."""

    def due(self, step: int) -> bool:
        """Whether it looks after optimizer step ``step``; the same on every rank."""

    def look(self, step: int, engine: AccelerateEngine) -> None:
        """Look after optimizer step ``step``. Every rank calls it; an InputError on all of them ends the training."""


@dataclass
class Progress:
    """Counts that a resumed run goes on with."""

    step: int = 0
    bad_samples: int = 0
    skipped_steps: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Those of ``Method.counters`` so far."""

    @classmethod
    def of(cls, checkpoint: Path) -> Progress:
        """What the checkpoint at that path counted.

        Raises:
            InputError: no checkpoint, or one of another kind of training.
        """
        counts: dict[str, int] = dict(read_state(checkpoint).get("progress", {}))
        if "step" not in counts:
            raise InputError(f"{checkpoint}: progress is damaged; give the path of another step-* folder")
        own = {name: counts.pop(name, 0) for name in ("step", "bad_samples", "skipped_steps")}
        return cls(**own, counts=counts)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps: all counts side by side."""
        own = {"step": self.step, "bad_samples": self.bad_samples, "skipped_steps": self.skipped_steps}
        return {**own, **self.counts}

    def add(self, skipped: bool, counts: Mapping[str, int]) -> None:
        """Add what the method counted in one step; ``skipped``: it was left out."""
        self.skipped_steps += skipped
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count


@dataclass(frozen=True)
class TrainJob:
    """Everything that the loop needs."""

    engine: AccelerateEngine
    method: Method
    data: Iterator[StepData]
    observer: Observer
    checkpointer: Checkpointer
    stop: StopFlag
    batch_size: int
    """Tiles in an optimizer step, over all processes."""
    rate: Callable[[int], float]
    """Learning rate of a step, from 0."""
    total_steps: int
    steps_per_epoch: int
    checkpoint_every: int
    """Optimizer steps between checkpoints; one is always written at the end."""
    check_bad: Callable[[int, int, Sequence[Any]], None]
    """Called on every rank with the numbers of bad and seen tiles over all ranks and this step's bad ones; raises when
    there are too many."""
    clip_norm: float | None = None
    """Largest norm of the whole gradient."""
    log_every: int = 1
    """Optimizer steps between journal lines."""
    max_skipped: int = 20
    """Steps in a row that may be left out before the run ends."""
    read_late: bool = False
    """Whether a step's numbers are read after the next step has been launched, so that a GPU need not wait for the
    host. Not for methods with an ``after_step``, which must know whether the step was skipped."""
    watch: Watch | None = None
    """Looks before the step's checkpoint, which then holds what came of it."""
    state: dict[str, Any] = field(default_factory=dict)
    """What every checkpoint carries besides weights and counts: run id, digests."""


def train(job: TrainJob, progress: Progress) -> bool:
    """Train from ``progress.step`` to the end.

    Returns:
        True when all steps are done, False when a signal asked for an earlier end (a checkpoint has been written).

    Raises:
        InputError: on every rank alike: a rank's data cannot be read, too many bad tiles, or too many non-finite losses
            in a row.
    """
    with job.stop.training(), step_exit(job.stop, job.engine.accelerator.num_processes) as way_out:
        return _train(job, progress, way_out)


def _train(job: TrainJob, progress: Progress, way_out: StepExit) -> bool:
    first, saved = progress.step, progress.step
    journal = _Journal(job, progress)
    while progress.step < job.total_steps:
        # fetch
        started, cpu_started = time.perf_counter(), time.process_time()
        data, bad = _fetch(job, way_out, first=progress.step == first)
        waited = time.perf_counter() - started
        if data is None:
            journal.settle()
            return _stopped(job, progress, saved)

        # step: gradient, then the update unless loss or gradient is not finite on any rank
        job.engine.keep_buffers()
        try:
            terms = job.method.step(job.engine, way_out.watch(data.micro_batches, first=progress.step == first))
        except GivenUp:
            job.engine.drop_step()
            journal.settle()
            return _stopped(job, progress, saved)
        lr = job.rate(progress.step)
        outcome = job.engine.optimizer_step(lr, job.clip_norm, terms["loss"], progress.step)
        job.engine.average(outcome)
        progress.step += 1
        progress.bad_samples += len(bad)

        # journal
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        line = {**_line(job, progress, data.epoch, lr, seconds, waited), "cpu_s": cpu}
        journal.add(Reading(terms, outcome, line))
        epoch_ends = progress.step % job.steps_per_epoch == 0
        save_due = progress.step == job.total_steps or progress.step % job.checkpoint_every == 0
        watch_due = job.watch is not None and job.watch.due(progress.step)
        journal.settle(but=int(job.read_late and not epoch_ends and not save_due and not watch_due))
        if bad:
            job.observer.log_bad(progress.step, bad)
        job.check_bad(progress.bad_samples, progress.step * job.batch_size, bad)
        with job.stop.unhurried():
            if job.watch is not None and watch_due:
                job.watch.look(progress.step, job.engine)
            enough = epoch_ends and job.observer.after_epoch(data.epoch, job.engine)

        # checkpoint
        if enough or save_due:
            _save(job, progress)
            saved = progress.step
        if enough:
            break
    return True


class _Journal:
    """Reads the steps' numbers in order, counts them and hands them to the observer."""

    def __init__(self, job: TrainJob, progress: Progress) -> None:
        self._job, self._progress, self._skipped_in_a_row = job, progress, 0
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        """Put a step's numbers behind those that have not been read yet."""
        self._readings.append(reading)

    def settle(self, but: int = 0) -> None:
        """Read all steps but the last ``but``.

        Raises:
            InputError: too many in a row were skipped.
        """
        while len(self._readings) > but:
            self._settle(self._readings.popleft())

    def _settle(self, reading: Reading) -> None:
        job, progress, line = self._job, self._progress, reading.line
        terms, grad_norm, skipped = reading.read()
        counts = {name: round(number) for name in job.method.counters if math.isfinite(number := terms.pop(name, 0.0))}
        progress.add(skipped, counts)
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            job.method.after_step(job.engine.bare, line["step"], job.total_steps)
        if line["step"] % job.log_every == 0 or line["step"] == job.total_steps:
            job.observer.log_step(_record(job, progress, line, terms, grad_norm))
        if self._skipped_in_a_row >= job.max_skipped:
            raise InputError(
                f"run.max_skipped = {self._skipped_in_a_row} steps in a row had a non-finite loss or gradient: "
                "lower optim.lr, or use run.precision bf16 or no, in another output_dir"
            )


def _stopped(job: TrainJob, progress: Progress, saved: int) -> bool:
    """Save a checkpoint of the last complete step. Returns False, as ``train`` does."""
    if progress.step > saved:
        _save(job, progress)
    if job.engine.accelerator.is_main_process:
        logger.warning("stopped by a signal after step %d; start again to go on", progress.step)
    return False


def _fetch(job: TrainJob, way_out: StepExit, *, first: bool) -> tuple[StepData | None, list[Any]]:
    """The next step's data, None where a signal asks to stop before it, and the bad tiles of all ranks.

    Ranks agree before the step by one small collective on the host. Without it a rank that cannot read its data would
    leave the others waiting in a collective of the step until the launcher ends them.
    """
    failure: Exception | None = None
    data: StepData | None = None
    try:
        with job.stop.waiting(first=first):
            data = next(job.data)
    except GivenUp:
        pass
    except (InputError, OSError, RuntimeError, EOFError) as error:  # or a worker that was killed
        failure = error
    bad = data.bad if data is not None else []
    # one step at least, or a job that is stopped early each time never ends
    leave = data is None or job.stop.overdue(first=first)
    total = way_out.total([failure is not None, leave, job.stop.interrupted, len(bad)])
    if total[0] > 0:
        raise _failure(job, failure)
    if total[2] > 0:
        job.stop.interrupted = True
    if total[1] > 0:
        return None, []
    return data, job.engine.gather_list(bad) if total[3] > 0 else []


def _failure(job: TrainJob, mine: Exception | None) -> Exception:
    """The exception that every rank raises when one of them has no data."""
    rank = job.engine.accelerator.process_index
    own = [(rank, str(mine), isinstance(mine, InputError))] if mine is not None else []
    failures = sorted(job.engine.gather_list(own))
    if mine is not None and not isinstance(mine, InputError):
        return mine
    first, reason, of_input = failures[0]
    # The same kind of error on every rank: schedulers restart a job that crashed, but not one that exits with 2.
    return (InputError if of_input else RuntimeError)(f"rank {first}: {reason}" if first else reason)


def _save(job: TrainJob, progress: Progress) -> None:
    with job.stop.unhurried():
        job.checkpointer.save(progress.step, job.engine, {**job.state, "progress": progress.state()})


def _line(job: TrainJob, progress: Progress, epoch: int, lr: float, seconds: float, waited: float) -> dict[str, Any]:
    """What the host knows of a step."""
    return {
        "step": progress.step,
        "epoch": epoch,
        "samples": progress.step * job.batch_size,
        "lr": lr,
        "tiles_per_s": job.batch_size / seconds,
        "data_wait_s": waited,
        "bad_samples": progress.bad_samples,
    }


def _record(
    job: TrainJob, progress: Progress, line: dict[str, Any], terms: dict[str, float], grad_norm: float
) -> dict[str, Any]:
    """The journal's line of a step."""
    first = {name: line[name] for name in ("step", "epoch", "samples")}
    last = {name: value for name, value in line.items() if name not in first and name != "lr"}
    return {
        **first,
        **terms,
        "lr": line["lr"],
        "grad_norm": grad_norm,
        **last,
        **{name: progress.counts.get(name, 0) for name in job.method.counters},
        "skipped_steps": progress.skipped_steps,
    }
