"""One trial: fine-tuning of one encoder, label budget and seed.

A trial leaves two files and is then done; one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import write_atomic, write_record, writing
from ca2cl.common.grid import RESULT, Grid, folder_name
from ca2cl.data.loading.stream import BadBudget
from ca2cl.errors import InputError
from ca2cl.evaluation.calibration.temperature import fit_temperature
from ca2cl.evaluation.finetune.best_checkpoint import KEPT, keep
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.finetune.early_stopping import Looks, Selection
from ca2cl.evaluation.finetune.original import Settled, epochs_of, validation
from ca2cl.evaluation.finetune.step import FineTuning, LabelledSet, Preprocessing, build_augmentation, predict
from ca2cl.evaluation.labelled import LabelledOrder, hold_out, labelled_steps
from ca2cl.evaluation.metrics import classification_metrics
from ca2cl.evaluation.protocol import Protocol
from ca2cl.evaluation.splits import budget_name, describe_budget
from ca2cl.models.backbone import build_encoder
from ca2cl.models.classifier import Classifier
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.runtime.signals import StopFlag
from ca2cl.training.checkpoint import Checkpointer, read_state, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.loop import Progress, TrainJob, train
from ca2cl.training.optim import build_optimizer
from ca2cl.training.schedule import learning_rate

logger = logging.getLogger(__name__)
Integers = npt.NDArray[np.int64]
PREDICTIONS = "predictions.safetensors"
CHECKPOINT_STEPS = 100
"""From one checkpoint to the next: with few labels a look is due every ten steps, and writing would take as long."""


class Trial(NamedTuple):
    """Encoder that it starts from, label budget, and number of the draw."""

    start: str
    budget: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the trial's folder."""
        return f"{folder_name(self.start)}-{budget_name(self.budget)}-seed{self.seed}"


def trial_grid(out: Path, starts: Iterable[str], budgets: Iterable[float], seeds: int) -> Grid[Trial]:
    """The trials of the job in ``out``.

    Args:
        out: folder of the job.
        starts: names of the encoders.
        budgets: label budgets.
        seeds: draws of each.
    """
    trials = itertools.starmap(Trial, itertools.product(starts, budgets, range(seeds)))
    return Grid((trial, out / "cells" / trial.name / RESULT) for trial in trials)


def build_network(config: FinetuneConfig, start: ResolvedEncoder, seed: int, classes: int) -> Classifier:
    """The classifier that a trial begins with.

    Args:
        config: the job's settings.
        start: the encoder to start from.
        seed: of the trial.
        classes: K.
    """
    torch.manual_seed(seed)
    size = config.image_size or start.card.input_size
    encoder = build_encoder(start.card.arch, config.norm, image_size=size, pooling=start.card.pooling)
    if start.uri != "random":  # that is another one for every seed
        encoder.load_state_dict(start.encoder.state_dict())
    encoder.requires_grad_(config.trains == "all")
    return Classifier(encoder, classes, zero_head=config.protocol == "honest")


def preprocessing_of(config: FinetuneConfig, start: ResolvedEncoder) -> Preprocessing:
    """Preprocessing of tiles for an encoder."""
    return Preprocessing(config.image_size or start.card.input_size, start.card.mean, start.card.std)


@dataclass(frozen=True)
class TuningJob:
    """Settings and data that the trials of a job share."""

    config: Settled
    protocol: Protocol
    train: LabelledSet
    """The tiles that labels are drawn from."""
    test: LabelledSet
    accelerator: Any
    stop: StopFlag

    @property
    def digests(self) -> list[str]:
        """Manifests of train and test."""
        return [tiles.index.manifest.digest for tiles in (self.train, self.test)]


@dataclass(frozen=True)
class TrialRun:
    """A trial that is ready to run.

    Attributes:
        start: the encoder to start from.
        labelled: sample numbers of the labelled tiles.
        folder: of the trial.
        card: what is known of the classifier before it is trained, where its weights are to stay.
    """

    job: TuningJob
    trial: Trial
    start: ResolvedEncoder
    labelled: Integers
    folder: Path
    card: EncoderCard | None

    @property
    def epochs(self) -> int:
        """Most passes over the labelled tiles."""
        return epochs_of(self.job.config, self.trial.budget)

    def run(self) -> bool:
        """Fine-tune, predict the test tiles once, and write both files. Every rank calls it.

        Returns:
            False where a signal asked for an end before it was done.
        """
        config, protocol, accelerator = self.job.config, self.job.protocol, self.job.accelerator
        original = protocol.name == "original"
        trained, watched, how = self._divide()
        # theirs is a smaller batch, too; of one tile a process BatchNorm can take no statistics
        fewest = 2 * accelerator.num_processes if original else None
        order = LabelledOrder(trained, config.batch_size, self.trial.seed, fewest)
        if order.size < accelerator.num_processes:
            raise InputError(
                f"labels is {describe_budget(self.trial.budget)}: {order.size} tiles to train on, fewer than the "
                f"{accelerator.num_processes} processes; start fewer, or give more labels"
            )
        network = build_network(config, self.start, self.trial.seed, len(self.job.train.index.classes))
        fused = accelerator.device.type == "cuda"
        optimizer = build_optimizer(config.optim, network, network.encoder, fused=fused)
        engine = AccelerateEngine(accelerator, network, optimizer, config.precision)
        checkpointer = Checkpointer(self.folder / "checkpoints", keep_last=1)
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        state, progress = _resume(checkpointer, engine)
        with ProgressBar(desc=self.trial.name, unit="step", disable=not accelerator.is_main_process) as bar:
            every = 1 if original else max(1, -(-10 // order.steps_per_epoch))
            # where the test tiles choose, all epochs stand for election
            patience = self.epochs if protocol.selects_on_test else config.patience
            looks = Looks(every, patience, config.batch_size, config.workers, by_accuracy=original)
            shown = bar if accelerator.is_main_process else None
            prepare = preprocessing_of(config, self.start)
            selection = Selection(self.folder, watched, prepare, looks, state, progress.step, checkpointer, shown)
            loop = self._loop(engine, order, selection, progress)
            bar.total = loop.total_steps
            if not selection.enough and not train(loop, progress):
                selection.close()
                return False
        selection.restore_best(engine)
        selection.close()
        held = len(watched.samples) if watched is not None and watched is not self.job.test else 0
        facts: dict[str, Any] = {"labelled": len(self.labelled), "held_out": held, "chosen_by": how}
        facts |= {
            "steps": progress.step,
            "bad_samples": progress.bad_samples,
            "temperature": self._temperature(engine, selection),
        }
        self._finish(engine, selection, facts)
        accelerator.free_memory()
        return True

    def _divide(self) -> tuple[Integers, LabelledSet | None, str]:
        """The samples to train on, the tiles that choose the epoch if any do, and in words which these are."""
        config, protocol, train, seed = self.job.config, self.job.protocol, self.job.train, self.trial.seed
        if protocol.selects_on_test:
            return self.labelled, self.job.test, "the test tiles"
        if protocol.splits_first:
            split = validation(protocol, len(train.samples), config.held_out, seed)
            held, how = train.samples[split], "tiles split off before labels were drawn"
            trained = self.labelled
        else:
            groups, labels_N = train.index.groups(), train.index.labels()[self.labelled]
            mask, how = hold_out(labels_N, [groups[sample] for sample in self.labelled], config.held_out, seed)
            held, trained = self.labelled[mask], self.labelled[~mask]
        return trained, replace(train, samples=held, title="held_out") if len(held) else None, how

    def _loop(
        self, engine: AccelerateEngine, order: LabelledOrder, selection: Selection, progress: Progress
    ) -> TrainJob:  # fmt: skip
        config, train, accelerator = self.job.config, self.job.train, self.job.accelerator
        per_epoch = order.steps_per_epoch
        steps = max(self.epochs, -(-config.min_steps // per_epoch)) * per_epoch
        stream = labelled_steps(
            train.index, train.reader, order, rank=accelerator.process_index, world=accelerator.num_processes,
            micro_batch_size=config.micro_batch_size, workers=config.workers, device=engine.device,
            steps=range(progress.step, steps),
        )  # fmt: skip
        augment = build_augmentation(config.augment, selection.prepare, self.trial.seed)
        every = max(CHECKPOINT_STEPS, selection.looks.every * per_epoch)
        return TrainJob(
            engine=engine, method=FineTuning(augment), data=stream, observer=selection,
            checkpointer=selection.checkpointer, stop=self.job.stop, batch_size=order.size,
            rate=lambda step: learning_rate(config.optim, step, steps, per_epoch), total_steps=steps,
            steps_per_epoch=per_epoch, checkpoint_every=every, clip_norm=config.optim.clip_norm,
            check_bad=BadBudget(0.01).check, state=selection.state,
        )  # fmt: skip

    def _temperature(self, engine: AccelerateEngine, selection: Selection) -> float | None:
        """Temperature that fits the held-out tiles; None where there are none. Every rank calls it."""
        if selection.watched is None or self.job.protocol.selects_on_test:
            return None
        config = self.job.config
        probabilities_HK, labels_H, _ = predict(
            engine, selection.watched, selection.prepare, batch_size=config.batch_size, workers=config.workers
        )
        return fit_temperature(labels_H, probabilities_HK)

    def _finish(self, engine: AccelerateEngine, selection: Selection, facts: dict[str, Any]) -> None:
        config, folder, best = self.job.config, self.folder, selection.best
        probabilities_MK, labels_M, samples_M = predict(
            engine, self.job.test, selection.prepare, batch_size=config.batch_size, workers=config.workers
        )
        if engine.accelerator.is_main_process:
            metrics = classification_metrics(labels_M, probabilities_MK)
            chosen = best.epoch >= 0 and not self.job.protocol.selects_on_test
            facts |= {
                "best_epoch": best.epoch,
                "held_out_loss": best.loss if chosen else None,
                "held_out_accuracy": best.accuracy if chosen else None,
            }
            if self.card is not None:
                with writing(folder, KEPT):
                    keep(folder, engine.bare, self.card, facts)
            arrays: dict[str, Any] = {
                "probabilities": probabilities_MK, "labels": labels_M, "samples": samples_M, "labelled": self.labelled
            }  # fmt: skip
            write_atomic(folder / PREDICTIONS, save(arrays), KEPT)
            scores = {"scores": metrics.scores(), "confusion": metrics.confusion.tolist()}
            write_record(folder / RESULT, {**self.trial._asdict(), **facts, **scores}, KEPT)
            for path in folder.glob("best-epoch-*"):
                path.unlink()
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            logger.info("%s: accuracy %.4f, macro F1 %.4f", folder.name, metrics.accuracy, metrics.macro_f1)
        engine.accelerator.wait_for_everyone()


def _resume(checkpointer: Checkpointer, engine: AccelerateEngine) -> tuple[dict[str, Any], Progress]:
    checkpoint = checkpointer.latest()
    if checkpoint is None:
        return {}, Progress()
    restore(checkpoint, engine)
    found = read_state(checkpoint)
    return {"best": found["best"]} if "best" in found else {}, Progress.of(checkpoint)
