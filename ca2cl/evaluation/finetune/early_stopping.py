"""Early stopping on held-out tiles.

The test set is never used, except for the authors' linear probe, which is there for comparison
(``protocol.ORIGINAL``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import replacing, writing
from ca2cl.errors import InputError
from ca2cl.evaluation.finetune.best_checkpoint import KEPT
from ca2cl.evaluation.finetune.step import LabelledSet, Preprocessing, predict
from ca2cl.tracking.journal import Journal
from ca2cl.training.checkpoint import Checkpointer, read_state
from ca2cl.training.engine import AccelerateEngine


@dataclass(frozen=True)
class Best:
    """Epoch that predicted the held-out tiles best so far; -1: none yet."""

    loss: float = float("inf")
    accuracy: float = 0.0
    epoch: int = -1
    waited: int = 0
    """Looks since then."""

    @classmethod
    def of(cls, state: Mapping[str, Any], where: Path) -> Best:
        """Read it from a checkpoint's state.

        Raises:
            InputError: it is damaged.
        """
        try:
            return cls(**state.get("best", {}))
        except TypeError as error:
            raise InputError(f"{where}: best is damaged ({error}); delete that folder and start again") from None


@dataclass(frozen=True)
class Looks:
    """Settings of a selection."""

    every: int
    """Epochs from one look to the next."""
    patience: int
    """Looks without a better one that end the training."""
    batch_size: int
    workers: int
    by_accuracy: bool = False
    """The most accurate epoch is the best, the last one of equals, instead of the one with the lowest log-loss:
    a few held-out tiles cannot tell accuracies apart, but the authors' protocol goes by them."""


class Selection:
    """Looks at held-out tiles after an epoch, keeps the weights that predict them best, and ends the training once it
    has been long enough (``training.loop.Observer``). Without held-out tiles the last weights are the ones.

    Args:
        folder: of the cell: its journal, and the best weights.
        watched: the tiles to look at, or None.
        state: what every checkpoint carries; ``best`` in it is where this selection stands.
        step: optimizer steps done when it begins.
        checkpointer: of the cell; its newest checkpoint names weights that must stay.
        bar: of the cell's steps on rank 0; None on the others, which write nothing.
    """

    def __init__(
        self,
        folder: Path,
        watched: LabelledSet | None,
        prepare: Preprocessing,
        looks: Looks,
        state: dict[str, Any],
        step: int,
        checkpointer: Checkpointer,
        bar: ProgressBar | None,
    ) -> None:
        self.checkpointer = checkpointer
        self.folder, self.watched, self.prepare, self.looks, self.state = folder, watched, prepare, looks, state
        self.best = Best.of(state, folder)
        self.bar = bar
        self.journal = None
        if bar is not None:
            self.journal = Journal(folder / "journal.jsonl")
            self.journal.rewind_to_step(step)

    @property
    def enough(self) -> bool:
        """Training has gone on for long enough without a better epoch."""
        return self.best.waited >= self.looks.patience

    def log_step(self, record: dict[str, Any]) -> None:
        """A journal line, on rank 0."""
        if self.journal is not None and self.bar is not None:
            self.journal.append(record)
            self.bar.update(record["step"] - self.bar.n)
            self.bar.set_postfix_str(f"loss {record['loss']:.3f}")

    def log_bad(self, step: int, tiles: Sequence[Any]) -> None:
        """A journal line for each tile that did not decode."""
        if self.journal is not None:
            for tile in tiles:
                self.journal.append({"event": "bad_sample", "in_step": step, "key": tile.key, "reason": tile.reason})

    def after_epoch(self, epoch: int, engine: AccelerateEngine) -> bool:
        """Look, every few epochs; whether it has been long enough. Every rank calls it."""
        if self.watched is None or (epoch + 1) % self.looks.every:
            return False
        probabilities_MK, labels_M, _ = predict(
            engine, self.watched, self.prepare, batch_size=self.looks.batch_size, workers=self.looks.workers
        )
        right_M = probabilities_MK[np.arange(len(labels_M)), labels_M].astype(np.float64)
        loss = float(-np.log(np.maximum(right_M, 1e-12)).mean())
        accuracy = float((probabilities_MK.argmax(1) == labels_M).mean())
        better = accuracy >= self.best.accuracy if self.looks.by_accuracy else loss < self.best.loss
        if better or self.best.epoch < 0:
            self.best = Best(loss, accuracy, epoch)
            self._keep_weights(engine)
        else:
            self.best = replace(self.best, waited=self.best.waited + 1)
        self.state["best"] = asdict(self.best)
        if self.journal is not None:
            self.journal.append({"event": self.watched.title, "epoch": epoch, "loss": loss, "accuracy": accuracy})
        return self.enough

    def _weights(self, epoch: int) -> Path:
        return self.folder / f"best-epoch-{epoch:06d}.safetensors"

    def _keep_weights(self, engine: AccelerateEngine) -> None:
        """Those that the newest checkpoint names stay too: whoever goes on from there needs them."""
        if self.journal is None:
            return
        target = self._weights(self.best.epoch)
        weights = {name: value.detach().cpu().contiguous() for name, value in engine.bare.state_dict().items()}
        with writing(self.folder, KEPT), replacing(target) as file:
            file.write(save(weights))
        newest = self.checkpointer.newest()
        named = Best.of(read_state(newest), newest).epoch if newest is not None else -1
        for old in self.folder.glob("best-epoch-*.safetensors"):
            if old not in (target, self._weights(named)):
                old.unlink()

    def restore_best(self, engine: AccelerateEngine) -> None:
        """Go back to the weights that were best. Every rank calls it."""
        engine.accelerator.wait_for_everyone()
        if self.best.epoch >= 0:
            path = self._weights(self.best.epoch)
            try:
                engine.bare.load_state_dict(load_file(path))
            except (OSError, RuntimeError, SafetensorError) as error:
                message = " ".join(str(error).split())[:200]
                raise InputError(f"{path}: damaged ({message}); delete {path.parent} and start again") from None

    def close(self) -> None:
        """End the journal."""
        if self.journal is not None:
            self.journal.close()
