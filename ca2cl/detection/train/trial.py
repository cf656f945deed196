"""One trial: a detector trained from one encoder with one seed.

Its folder is an MLflow run of its own, live. It leaves the detector, its predictions, a sheet of samples, and last its
result.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import write_atomic, write_record, writing
from ca2cl.common.grid import RESULT, Grid, folder_name
from ca2cl.config import TrackingConfig
from ca2cl.detection.engines.base import CocoSplit, Detector, Engine, TrainJob, record_of
from ca2cl.detection.engines.checkpoint import KEPT
from ca2cl.detection.scores.plots import draw_samples
from ca2cl.detection.scores.scoring import SplitScores, score_split
from ca2cl.detection.train.config import DetectConfig
from ca2cl.runtime.signals import StopFlag

if TYPE_CHECKING:
    from ca2cl.tracking.run import NullTracker

logger = logging.getLogger(__name__)
CELLS, DETECTOR, PREDICTIONS = "cells", "detector", "predictions"


class Trial(NamedTuple):
    """Which encoder the body is from, and which training."""

    start: str
    seed: int

    @property
    def name(self) -> str:
        """Name of the trial's folder."""
        return f"{folder_name(self.start)}-seed{self.seed}"


FIRST = Trial("encoder", 0)
"""The encoder's own first training."""


def trial_grid(out: Path, starts: Iterable[str], seeds: int) -> Grid[Trial]:
    """The trials of the job in ``out``."""
    trials = itertools.starmap(Trial, itertools.product(starts, range(seeds)))
    return Grid((trial, out / CELLS / trial.name / RESULT) for trial in trials)


@dataclass(frozen=True)
class TrialSettings:
    """Parameters of the trial's MLflow run."""

    start: str
    seed: int
    encoder: str
    job: DetectConfig
    tracking: TrackingConfig


def flat(scored: Mapping[str, SplitScores]) -> dict[str, float]:
    """``SPLIT/box/AP`` and so on."""
    return {f"{split}/{name}": value for split, one in scored.items() for name, value in one.scores.items()}


class TrialRun:
    """Run of a trial, and the engine's ``Watch`` on it: a progress bar, the journal and MLflow on rank 0.

    Args:
        trial: encoder and seed.
        engine: trains and predicts.
        job: what is trained on what; its checkpoints lie in the trial's folder.
        splits: that are scored, by name.
        config: the verb's.
        accelerator: accelerate's, of all ranks.
        stop: of the whole job.
    """

    def __init__(
        self, trial: Trial, engine: Engine, job: TrainJob, splits: Mapping[str, CocoSplit], config: DetectConfig,
        accelerator: Any, stop: StopFlag,
    ) -> None:  # fmt: skip
        self.trial, self.engine, self.job, self.splits, self.config = trial, engine, job, splits, config
        self.accelerator, self.stop = accelerator, stop
        self.folder, self.iterations = job.folder.parent, job.schedule.iterations
        hidden = not accelerator.is_main_process
        self.bar = ProgressBar(total=self.iterations, desc=trial.name, unit="step", disable=hidden)
        self.tracker: NullTracker | None = None
        self.loss = float("nan")

    def run(self) -> bool:
        """Train and score. Every rank calls it.

        Returns:
            False where a signal ended it early.

        Raises:
            InputError: as the engine's.
        """
        scored = None
        try:
            detector = self.engine.build(self.job)
            with self.stop.training():
                finished = detector.train(self)
            if finished:
                scored = self.score(detector)
            if scored is not None:
                self.keep(scored, detector)
        except BaseException as error:
            self.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
            raise
        self.close("FINISHED" if finished else "KILLED")
        if scored is not None:
            shutil.rmtree(self.job.folder, ignore_errors=True)
        if finished:
            self.accelerator.wait_for_everyone()
        return finished

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """A journal line."""
        self.loss = values["loss"]
        if self.accelerator.is_main_process:
            self._opened(step - 1).log_step({"step": step, **values})
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(f"loss {self.loss:.3f}")

    def on_evaluation(self, step: int, detector: Detector) -> None:
        """Scores on the way, in the journal and for nothing else."""
        scored = self.score(detector)
        if scored is not None:
            self._opened(step).log_step({"step": step, "loss": self.loss, **flat(scored)})

    def score(self, detector: Detector) -> dict[str, SplitScores] | None:
        """Every split's scores; None on ranks other than 0."""
        least = self.config.min_score
        found = {
            name: score_split(detector, split, name, min_score=least, accelerator=self.accelerator)
            for name, split in self.splits.items()
        }
        return {name: scores for name, scores in found.items() if scores is not None} or None

    def keep(self, scored: Mapping[str, SplitScores], detector: Detector) -> None:
        """Write what the trial leaves, the result last. Rank 0 calls it."""
        tracker = self._opened(self.iterations)
        tracker.log_step({"step": self.iterations, "loss": self.loss, **flat(scored)})
        shutil.rmtree(self.folder / DETECTOR, ignore_errors=True)
        with writing(self.folder, KEPT):
            detector.save(self.folder / DETECTOR)
            (self.folder / PREDICTIONS).mkdir(exist_ok=True)
        for name, one in scored.items():
            write_atomic(self.folder / PREDICTIONS / f"{name}.json", json.dumps(one.results).encode(), KEPT)
            figure = draw_samples(self.splits[name], name, one.results, self.config.min_score)
            tracker.log_figure(f"samples-{name}", figure)
        content = {**self.trial._asdict(), **record_of(self.engine, self.job), "steps": self.iterations}
        content |= {"run_id": tracker.run_id, "scores": {name: one.scores for name, one in scored.items()}}
        write_record(self.folder / RESULT, content, KEPT)
        for name in (DETECTOR, PREDICTIONS):
            tracker.log_artifact(self.folder / name, name)
        tracker.log_artifact(self.folder / RESULT)
        found = ", ".join(f"{name} AP(box) {one.scores.get('box/AP', 0.0):.4f}" for name, one in scored.items())
        logger.info("%s: %s", self.trial.name, found)

    def close(self, status: Any) -> None:
        """End the bar and the MLflow run."""
        self.bar.close()
        if self.tracker is not None:
            self.tracker.finish(status)

    def _opened(self, step: int) -> NullTracker:
        """The run, opened with the first report of the engine: ``step`` steps were done before."""
        from ca2cl.tracking.run import open_run

        if self.tracker is None:
            tracking, encoder = self.config.tracking, self.job.encoder
            tracking = replace(tracking, run_name=f"{tracking.run_name or 'detect'}-{self.trial.name}")
            settings = TrialSettings(*self.trial, encoder.uri, self.config, tracking)
            self.tracker = open_run(self.folder, settings, resume=True, step=step)
            self.tracker.set_tag("ca2cl.kind", "detect-training")
            self.tracker.describe(
                f"Training {self.trial.name} of a detection job on {self.config.dataset}. "
                "The job's own run has the scores of all its trainings."
            )
            self.tracker.set_tag("ca2cl.engine", f"{self.engine.name} {self.engine.version}")
            if encoder.source_run_id:  # not SOURCE_RUN_TAG: what belongs to the encoder is the whole job's run
                self.tracker.set_tag("ca2cl.trained_from", encoder.source_run_id)
        return self.tracker
