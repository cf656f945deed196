"""One trial: fine-tuning of one encoder, label budget and seed.

A trial leaves two files and is then done; one that was cut short goes on from its checkpoint.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from tqdm import tqdm

from ca2cl.common.files import write_atomic, write_record, writing
from ca2cl.common.grid import RESULT, Grid, folder_name
from ca2cl.config import OptimConfig
from ca2cl.data.loading.stream import BadBudget
from ca2cl.errors import InputError
from ca2cl.evaluation.finetune.best_checkpoint import KEPT, keep
from ca2cl.evaluation.finetune.early_stopping import Looks, Selection
from ca2cl.evaluation.finetune.original import validation
from ca2cl.evaluation.finetune.step import FineTuning, LabelledSet, Preprocessing, predict
from ca2cl.evaluation.labelled import LabelledOrder, hold_out, labelled_steps
from ca2cl.evaluation.metrics import classification_metrics
from ca2cl.evaluation.protocol import Protocol
from ca2cl.evaluation.splits import budget_name, describe_budget
from ca2cl.models.classifier import Classifier
from ca2cl.models.encoder_io import EncoderCard
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
    """Which encoder it starts from, how many tiles are labelled, and which draw of them."""

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


@dataclass(frozen=True)
class Recipe:
    """How every trial is trained."""

    optim: OptimConfig
    batch_size: int
    micro_batch_size: int | None
    epochs: int
    min_steps: int
    held_out: float
    patience: int
    precision: Any
    workers: int
    augment: Any
    prepare: Preprocessing
    protocol: Protocol
    card: EncoderCard | None
    """What is known of the classifier before it is trained, for the trials whose weights are to stay."""


@dataclass(frozen=True)
class Data:
    """The labelled tiles to draw from, all of them, and the test tiles; ``labels`` and ``groups`` are the training
    index's, and ``by_slide`` says whether any labelled tile has one."""

    train: LabelledSet
    test: LabelledSet
    labels: Integers
    groups: list[str | None]
    by_slide: bool


def run_trial(
    trial: Trial, labelled: Integers, network: Classifier, recipe: Recipe, data: Data, folder: Path, accelerator: Any,
    stop: StopFlag,
) -> bool:  # fmt: skip
    """Fine-tune, predict the test tiles once, and write both files. Every rank calls it.

    Args:
        labelled: sample numbers of the labelled tiles.
        network: to start from.
        folder: of the trial.

    Returns:
        False where a signal asked for an end before it was done.
    """
    protocol = recipe.protocol
    original = protocol.name == "original"
    trained, watched, how = _divide(trial, labelled, recipe, data)
    # theirs is a smaller batch, too; of one tile a process BatchNorm can take no statistics
    fewest = 2 * accelerator.num_processes if original else None
    order = LabelledOrder(trained, recipe.batch_size, trial.seed, fewest)
    if order.size < accelerator.num_processes:
        raise InputError(
            f"labels is {describe_budget(trial.budget)}: {order.size} tiles to train on, fewer than the "
            f"{accelerator.num_processes} processes; start fewer, or give more labels"
        )
    engine = AccelerateEngine(accelerator, network, build_optimizer(recipe.optim, network), recipe.precision)
    checkpointer = Checkpointer(folder / "checkpoints", keep_last=1)
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    state, progress = _resume(checkpointer, engine)
    with tqdm(desc=trial.name, unit="step", disable=None if accelerator.is_main_process else True) as bar:
        every = 1 if original else max(1, -(-10 // order.steps_per_epoch))
        # where the test tiles choose, all epochs stand for election
        patience = recipe.epochs if protocol.selects_on_test else recipe.patience
        looks = Looks(every, patience, recipe.batch_size, recipe.workers, by_accuracy=original)
        seen_bar = bar if accelerator.is_main_process else None
        selection = Selection(folder, watched, recipe.prepare, looks, state, progress.step, checkpointer, seen_bar)
        job = _job(engine, order, recipe, data, selection, checkpointer, stop, progress)
        bar.total = job.total_steps
        if not selection.enough and not train(job, progress):
            selection.close()
            return False
    selection.restore_best(engine)
    selection.close()
    held = len(watched.samples) if watched is not None and watched is not data.test else 0
    facts = {"labelled": len(labelled), "held_out": held, "chosen_by": how, "steps": progress.step}
    facts["bad_samples"] = progress.bad_samples
    _finish(trial, labelled, engine, recipe, data, selection, folder, facts)
    accelerator.free_memory()
    return True


def _divide(
    trial: Trial, labelled: Integers, recipe: Recipe, data: Data
) -> tuple[Integers, LabelledSet | None, str]:  # fmt: skip
    """The samples to train on, the tiles that choose the epoch if any do, and in words which these are."""
    if recipe.protocol.selects_on_test:
        return labelled, data.test, "the test tiles"
    if recipe.protocol.splits_first:
        split = validation(recipe.protocol, len(data.train.samples), recipe.held_out, trial.seed)
        held, how = data.train.samples[split], "tiles split off before labels were drawn"
        trained = labelled
    else:
        groups = [data.groups[sample] for sample in labelled] if data.by_slide else None
        mask, how = hold_out(data.labels[labelled], groups, recipe.held_out, trial.seed)
        held, trained = labelled[mask], labelled[~mask]
    watched = LabelledSet(data.train.index, data.train.reader, held, "held_out") if len(held) else None
    return trained, watched, how


def _resume(checkpointer: Checkpointer, engine: AccelerateEngine) -> tuple[dict[str, Any], Progress]:
    checkpoint = checkpointer.latest()
    if checkpoint is None:
        return {}, Progress()
    restore(checkpoint, engine)
    found = read_state(checkpoint)
    return {"best": found["best"]} if "best" in found else {}, Progress.of(checkpoint)


def _job(
    engine: AccelerateEngine, order: LabelledOrder, recipe: Recipe, data: Data, selection: Selection,
    checkpointer: Checkpointer, stop: StopFlag, progress: Progress,
) -> TrainJob:  # fmt: skip
    per_epoch = order.steps_per_epoch
    steps = max(recipe.epochs, -(-recipe.min_steps // per_epoch)) * per_epoch
    accelerator = engine.accelerator
    stream = labelled_steps(
        data.train.index, data.train.reader, order, rank=accelerator.process_index, world=accelerator.num_processes,
        micro_batch_size=recipe.micro_batch_size, workers=recipe.workers, device=engine.device,
        steps=range(progress.step, steps),
    )  # fmt: skip
    every = max(CHECKPOINT_STEPS, selection.looks.every * per_epoch)
    return TrainJob(
        engine=engine, method=FineTuning(recipe.augment), data=stream, observer=selection, checkpointer=checkpointer,
        stop=stop, batch_size=order.size, rate=lambda step: learning_rate(recipe.optim, step, steps, per_epoch),
        total_steps=steps, steps_per_epoch=per_epoch, checkpoint_every=every, clip_norm=recipe.optim.clip_norm,
        check_bad=BadBudget(0.01).check, state=selection.state,
    )  # fmt: skip


def _finish(
    trial: Trial, labelled: Integers, engine: AccelerateEngine, recipe: Recipe, data: Data, selection: Selection,
    folder: Path, facts: dict[str, Any],
) -> None:  # fmt: skip
    probabilities_MK, labels_M, samples_M = predict(
        engine, data.test, recipe.prepare, batch_size=recipe.batch_size, workers=recipe.workers
    )
    if engine.accelerator.is_main_process:
        metrics = classification_metrics(labels_M, probabilities_MK)
        best = selection.best
        facts |= {"best_epoch": best.epoch, "held_out_loss": None, "held_out_accuracy": None}
        if best.epoch >= 0 and not recipe.protocol.selects_on_test:
            facts |= {"held_out_loss": best.loss, "held_out_accuracy": best.accuracy}
        result = {**trial._asdict(), **facts, "scores": metrics.scores(), "confusion": metrics.confusion.tolist()}
        arrays: dict[str, Any] = {"labels": labels_M, "samples": samples_M, "labelled": labelled}
        if recipe.card is not None:
            with writing(folder, KEPT):
                keep(folder, engine.bare, recipe.card, facts)
        write_atomic(folder / PREDICTIONS, save({"probabilities": probabilities_MK, **arrays}), KEPT)
        write_record(folder / RESULT, result, KEPT)
        for path in folder.glob("best-epoch-*"):
            path.unlink()
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        logger.info("%s: accuracy %.4f, macro F1 %.4f", folder.name, metrics.accuracy, metrics.macro_f1)
    engine.accelerator.wait_for_everyone()
