"""``ca2cl finetune``: fine-tune encoders at several label budgets and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.job_dir import JobDir, changed, job_record
from ca2cl.config import flatten
from ca2cl.data.remote.reader import ShardReader
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import open_sets, slides_of
from ca2cl.evaluation.finetune.best_checkpoint import keep_best
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.finetune.original import Settled, draw_original, protocol_of, settled
from ca2cl.evaluation.finetune.report import RECORD, report
from ca2cl.evaluation.finetune.step import LabelledSet
from ca2cl.evaluation.finetune.trial import TrialRun, TuningJob, trial_grid
from ca2cl.evaluation.leaks.find import find_leak, side_of
from ca2cl.evaluation.protocol import describe_draw
from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.splits import Subsets, draw_subsets
from ca2cl.models.encoder_io import EncoderCard, weights_digest
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.distributed import Ranks
from ca2cl.runtime.launched import under_deepspeed
from ca2cl.runtime.precision import check_precision
from ca2cl.runtime.signals import StopFlag

_FREE = frozenset({"train", "test", "cache_dir"})
"""Settings of the record that say where data lie, not which."""


def run(config: FinetuneConfig, last: bool = True) -> int:
    """Fine-tune every trial that is not done yet, print the table, log the MLflow run. Returns the exit code: 0, or 85
    after a signal and a checkpoint.

    Args:
        last: whether no other job of this process follows: the process group ends with it.

    Raises:
        InputError: data sets that do not fit together, an unknown encoder, a folder that holds another job.
    """
    with ExitStack() as held:
        accelerator = _run(settled(config), held)
    if accelerator is not None and last:
        accelerator.end_training()
    return StopFlag().install().exit_code if accelerator is None else 0


def _run(config: Settled, held: ExitStack) -> Any:
    """The accelerator of a job that is done; None where a signal ended it."""
    if under_deepspeed():
        raise InputError("finetune does not run under DeepSpeed: a trial is a small job; use a DDP configuration")
    stop = StopFlag().install()
    indexes = open_sets(config.train, [config.test], config.cache_dir)
    starts = _starts(config)
    with stop.joining():
        accelerator = build_accelerator()
    check_precision(config.precision, accelerator.device, "precision")
    ranks = Ranks()
    train, test = (
        LabelledSet(index, ShardReader(root, config.cache_dir), np.flatnonzero(index.labels() >= 0), title)
        for root, index, title in zip((config.train, config.test), indexes, ("train", "test"), strict=True)
    )
    job = TuningJob(config, protocol_of(config), train, test, accelerator, stop)
    ranks.from_first(lambda: _begin(job, starts, held))
    slides = slides_of(train.index, train.samples.tolist(), config.train if accelerator.is_main_process else "")
    by_slide = slides is not None and config.draw_by == "auto" and not job.protocol.replacement
    subsets = _draw(job, slides if by_slide else None)
    grid = trial_grid(Path(config.output_dir), starts, subsets, config.seeds)
    for trial in ranks.from_first(grid.missing):
        labelled = train.samples[subsets[trial.budget][trial.seed]]
        stays = trial.start == ENCODER and trial.budget == list(subsets)[-1] and config.protocol == "honest"
        card = _card(job, starts[ENCODER]) if stays else None
        if not TrialRun(job, trial, starts[trial.start], labelled, grid[trial].parent, card).run():
            return None
        if stays and accelerator.is_main_process:
            keep_best([path.parent for path in grid.values()])
    if accelerator.is_main_process:
        report(job, starts[ENCODER], grid, describe_draw(job.protocol, by_slide))
    accelerator.wait_for_everyone()
    return accelerator


def _draw(job: TuningJob, slides: Sequence[str] | None) -> Subsets:
    config, train = job.config, job.train
    if job.protocol.name == "original":
        return draw_original(job.protocol, len(train.samples), config.labels, config.seeds, config.held_out)
    return draw_subsets(train.index.labels()[train.samples], config.labels, config.seeds, groups=slides)


def _starts(config: FinetuneConfig) -> dict[str, ResolvedEncoder]:
    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    where |= {"arch": first.card.arch, "like": first.card}
    others = {name: resolve_encoder(name, **where).beside(first) for name in config.against}
    return {ENCODER: first, **others}


def _begin(job: TuningJob, starts: Mapping[str, ResolvedEncoder], held: ExitStack) -> None:
    """Claim the folder, and write down what train and test share."""
    free = ("tracking.", "output_dir", "workers", "note_protocol", "details")
    kept = {name: value for name, value in flatten(job.config).items() if not name.startswith(free)}
    weights = [weights_digest(found.encoder, found.card.mean, found.card.std) for found in starts.values()]
    folder, record = job_dir(job.config), job_record(kept, data=job.digests, weights=weights)
    if not folder.begin(record, held):
        workers = job.config.workers
        sides = (side_of(tiles.index, tiles.reader, tiles.title, workers=workers) for tiles in (job.train, job.test))
        leak = find_leak(*sides, encoders=starts)
        folder.write({**record, "leak": leak})


def job_dir(config: FinetuneConfig) -> JobDir:
    """The job's folder."""
    return JobDir(Path(config.output_dir), RECORD, _changes)


def _changes(held: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what a job differs from the one that its folder holds. Data and weights are known by their digests, wherever
    they lie; the first jobs did not write the weights' down."""
    same_weights = held.get("weights") == now["weights"]
    free = {*_FREE, "encoder"} if same_weights else _FREE
    changes = changed(held["settings"], {name: value for name, value in now["settings"].items() if name not in free})
    named = any(change.startswith(("encoder ", "against ")) for change in changes)
    if "weights" in held and not same_weights and not named:
        changes.append("encoder or against means other weights now")
    return changes + (["the tiles in train or test"] if held["data"] != now["data"] else [])


def _card(job: TuningJob, start: ResolvedEncoder) -> EncoderCard:
    index, card = job.train.index, start.card
    classes = tuple(index.classes)
    return EncoderCard(
        arch=card.arch, feature_dim=card.feature_dim, mean=card.mean, std=card.std,
        input_size=job.config.image_size or card.input_size, manifest_digest=index.manifest.digest, classes=classes,
        predicts=classes, origin=f"{start.uri}, fine-tuned", origin_run_id=start.source_run_id,
        earlier_manifests=card.manifests, pooling=card.pooling, start=card.start,
        start_layout=card.start_layout, start_tensors=card.start_tensors, start_sha256=card.start_sha256,
        licence=card.licence, licence_text=card.licence_text,
    )  # fmt: skip
