"""Journal lines, progress bar and figures of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.tables import duration
from ca2cl.config import flatten
from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.loading.stream import BadTile
from ca2cl.data.remote.reader import ShardReader, is_remote
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.methods.base import Method
from ca2cl.methods.chance import chance_levels
from ca2cl.models.preprocess import preprocess
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.memory.machine import peak_bytes
from ca2cl.tracking.figures import curves_figure
from ca2cl.tracking.journal import WATCH_PREFIX, training_lines, watch_lines
from ca2cl.tracking.run import NullTracker, RunTracker
from ca2cl.tracking.running_means import LossMeter, RunningMean
from ca2cl.training.engine import AccelerateEngine

logger = logging.getLogger(__name__)
_FIGURE_TILES = 256
_LONG_STEP_S = 30.0
_OFTENEST_S, _RAREST_S = 10.0, 600.0
"""Seconds between two progress lines."""
_LOOKED = (("knn", "k-NN", ".3f"), ("linear", "linear", ".3f"), ("rank", "rank", ".1f"))
_REMOTE_SHARDS = 8  # whole ones are fetched, while the other ranks wait


class RunObserver:
    """Logs a run on rank 0; does nothing on the others (their tracker is a ``NullTracker``).

    Args:
        method: whose curves and figures are drawn.
        state: what every checkpoint carries; it learns the run's id as soon as MLflow has given one.
        done: optimizer steps of earlier starts.
    """

    def __init__(
        self,
        tracker: NullTracker,
        config: PretrainConfig,
        method: Method,
        index: ShardIndex,
        reader: ShardReader,
        order: LaneOrder,
        total_steps: int,
        state: dict[str, Any],
        done: int = 0,
    ) -> None:
        self.method = method
        self.tracker, self.config, self.index, self.reader, self.order = tracker, config, index, reader, order
        self.state = state
        self.last_metrics: dict[str, float | None] = {}
        self.last_watch: dict[str, float | None] = {}
        self.active = isinstance(tracker, RunTracker)
        if isinstance(tracker, RunTracker):  # a run that goes on after its last step still knows how it ended
            for record in training_lines(tracker.run_dir / "journal.jsonl"):
                self._remember(record)
            for record in watch_lines(tracker.run_dir / "journal.jsonl"):
                self.last_watch = {name: value for name, value in record.items() if name.startswith(WATCH_PREFIX)}
        # on a terminal a bar, otherwise a plain line now and then
        terminal = self.active and sys.stderr.isatty()
        self._bar = ProgressBar(total=total_steps, initial=done, disable=not terminal)
        self._total_steps, self._steps_seen = total_steps, 0
        self._chance = chance_levels(type(method), flatten(config))
        self._losses, self._step_s = LossMeter(method.curves, self._chance), RunningMean()
        self._began, self._next_line = time.monotonic(), 0.0

    def log_step(self, record: dict[str, Any]) -> None:
        """Write a training line to the journal, and progress to the terminal."""
        self._remember(record)
        self.tracker.log_step(record)
        if record["step"] % self.config.run.checkpoint_every == 0 or record["step"] == self._total_steps:
            self.tracker.await_run()  # a checkpoint follows, and names the run
        self.state["run_id"] = self.tracker.run_id
        if not self.active:
            return
        self._losses.add(record)
        self._log_pace(record["step"], self.config.run.batch_size / record["tiles_per_s"])
        self._bar.update(record["step"] - self._bar.n)
        self._bar.set_postfix_str(
            f"{self._losses.text(2, digits=2)}, {record['tiles_per_s']:.0f} tiles/s{self._looked()}"
        )
        if self._bar.disable and self._line_due(record["step"]):
            logger.info(
                "step %d of %d, epoch %d: %s; lr %.2e, %.0f tiles/s, %s left",
                record["step"], self._total_steps, record["epoch"], self._losses.text(), record["lr"],
                record["tiles_per_s"], duration((self._total_steps - record["step"]) * self._step_s.value),
            )  # fmt: skip

    def _line_due(self, step: int) -> bool:
        """True for the steps to log: the first, the last, and others ever more rarely.

        A line comes 10 s after the one before it, or later, when a twentieth of the time so far has passed, or 10
        minutes.
        """
        now = time.monotonic()
        if now < self._next_line and step != self._total_steps:
            return False
        self._next_line = now + min(_RAREST_S, max(_OFTENEST_S, (now - self._began) / 20))
        return True

    def log_watch(self, step: int, numbers: Mapping[str, float], collapse: str) -> None:
        """Write a watch's line to the journal, and its numbers to the terminal."""
        self.tracker.log_watch(step, numbers, collapse)
        self.last_watch = {f"{WATCH_PREFIX}{name}": value for name, value in numbers.items()}
        if self.active and self._bar.disable:
            logger.info(
                "watch at step %d%s, alignment %.3f, uniformity %.3f, centroids of %.1f to %.1f %% of the tiles%s",
                step, self._looked(), numbers["alignment"], numbers["uniformity"], 100 * numbers["smallest"],
                100 * numbers["largest"], f"; {collapse}" if collapse else "",
            )  # fmt: skip

    def _looked(self) -> str:
        """The last watch's numbers in a few words; empty before the first."""
        found = [(label, self.last_watch.get(f"{WATCH_PREFIX}{name}"), form) for name, label, form in _LOOKED]
        words = [f"{label} {value:{form}}" for label, value, form in found if value is not None]
        return f": {', '.join(words)}" if words else ""

    def log_collapse(self, step: int, reason: str) -> None:
        """Tag the run with a collapse of its features."""
        self.tracker.set_tag("ca2cl.collapse", f"step {step}: {reason}")

    def _log_pace(self, step: int, seconds: float) -> None:
        """Log how long an epoch will take, from the second step of this start.

        The first step includes warm-up: it gives a bound, and only if it takes very long.
        """
        self._steps_seen += 1
        if self._steps_seen == 2:
            self._step_s = RunningMean()  # the first step warms up
        self._step_s.add(seconds)
        if self._steps_seen > 2 or self._total_steps - step < 1 or (self._steps_seen == 1 and seconds < _LONG_STEP_S):
            return
        per_epoch = self.order.steps_per_epoch
        logger.info(
            "a step takes %s %s, an epoch of %d steps %s, what is left %s; peak memory %.1f GB",
            "at most" if self._steps_seen == 1 else "about", duration(seconds), per_epoch,
            duration(per_epoch * seconds), duration((self._total_steps - step) * seconds), peak_bytes() / 1e9,
        )  # fmt: skip

    def log_bad(self, step: int, tiles: Sequence[BadTile]) -> None:
        """Write a journal line for each tile that had to be replaced."""
        for tile in tiles:
            self.tracker.log_event("bad_sample", in_step=step, key=tile.key, reason=tile.reason)

    def _remember(self, record: Mapping[str, Any]) -> None:
        self.last_metrics = {key: value for key, value in record.items() if isinstance(value, (int, float))}

    def after_epoch(self, epoch: int, engine: AccelerateEngine) -> None:
        """Figures every ``run.figures_every`` epochs."""
        every = self.config.run.figures_every
        if every and (epoch + 1) % every == 0:
            self.figures(engine)

    def figures(self, engine: AccelerateEngine) -> None:
        """The curves so far, and the method's own figures on a fixed sample of tiles."""
        if not isinstance(self.tracker, RunTracker):
            return
        curves = curves_figure(self.tracker.run_dir / "journal.jsonl", self.method.curves, self._chance)
        self.tracker.log_figure("curves", curves)
        if engine.sharded:  # its passes need all ranks, and only this one draws
            return
        samples = _spread(self.index.starts, _REMOTE_SHARDS if is_remote(self.config.data.shards) else None)
        try:
            read = [part[0] for part in iterate_tiles(self.index, self.reader, samples, batch_size=64)]
        except InputError as error:  # met by this rank alone, and a picture is not worth the run
            logger.warning("no figures of tiles: %s", error)
            return
        for name, figure in self._drawn(engine, read).items():
            self.tracker.log_figure(name, figure)

    @torch.no_grad()
    def _drawn(self, engine: AccelerateEngine, read: Sequence[Tensor]) -> dict[str, Any]:
        """The method's figures of tiles, batch after batch (B, H, W, 3)."""
        (mean, std), network = self.config.model.normalisation, engine.bare
        inputs = (preprocess(x.to(engine.device), self.config.data.image_size, mean, std) for x in read)
        training = network.training
        network.eval()
        try:
            return self.method.figures(network, torch.cat(list(read)), inputs)
        finally:
            network.train(training)

    def close(self) -> None:
        """End the bar."""
        self._bar.close()


def _spread(starts: npt.NDArray[np.int64], most: int | None) -> npt.NDArray[np.int64]:
    """The figure's samples: evenly over all shards, or over at most so many of them; ``starts``: the index's."""
    shards, samples = len(starts) - 1, int(starts[-1])
    if most is None or most >= shards:
        return np.linspace(0, samples - 1, min(_FIGURE_TILES, samples)).astype(np.int64)
    ends = [(starts[shard], starts[shard + 1]) for shard in np.linspace(0, shards - 1, most).astype(np.int64)]
    parts = [np.linspace(first, last - 1, min(_FIGURE_TILES // most, last - first)) for first, last in ends]
    return np.concatenate(parts).astype(np.int64)
