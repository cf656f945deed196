"""``ca2cl finetune``: fine-tune encoders at several label budgets and seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ca2cl import config as settings
from ca2cl.common.job_dir import JobDir, changed, job_record
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import open_pair
from ca2cl.evaluation.finetune.best_checkpoint import keep_best
from ca2cl.evaluation.finetune.config import START, FinetuneConfig
from ca2cl.evaluation.finetune.original import draw_original, protocol_of, settled, their_epochs
from ca2cl.evaluation.finetune.report import RECORD, report
from ca2cl.evaluation.finetune.step import LabelledSet, Preprocessing, build_augmentation
from ca2cl.evaluation.finetune.trial import Data, Recipe, Trial, run_trial, trial_grid
from ca2cl.evaluation.leakage import find_leak, side_of
from ca2cl.evaluation.protocol import Protocol, describe_draw
from ca2cl.evaluation.splits import Subsets, draw_subsets, known_slides
from ca2cl.models.backbone import build_encoder
from ca2cl.models.classifier import Classifier
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


def _run(config: FinetuneConfig, held: ExitStack) -> Any:
    """The accelerator of a job that is done; None where a signal ended it."""
    if under_deepspeed():
        raise InputError("finetune does not run under DeepSpeed: a trial is a small job; use a DDP configuration")
    stop = StopFlag().install()
    indexes = open_pair(config.train, config.test, config.cache_dir)
    starts = _starts(config)
    with stop.joining():
        accelerator = build_accelerator()
    check_precision(config.precision, accelerator.device, "precision")
    ranks = Ranks()
    train, test = (
        LabelledSet(index, ShardReader(root, config.cache_dir), np.flatnonzero(index.labels() >= 0), title)
        for root, index, title in zip((config.train, config.test), indexes, ("train", "test"), strict=True)
    )
    ranks.from_first(lambda: _begin(config, train, test, starts, held))
    groups, protocol = train.index.groups(), protocol_of(config)
    told = config.train if accelerator.is_main_process else ""
    slides = known_slides([groups[sample] for sample in train.samples], told)
    data = Data(train, test, train.index.labels(), groups, by_slide=slides is not None)
    by_slide = slides is not None and config.draw_by == "auto" and not protocol.replacement
    subsets = _draw(config, protocol, data.labels[train.samples], slides if by_slide else None)
    grid = trial_grid(Path(config.output_dir), starts, subsets, config.seeds)
    card = _card(config, starts[START], train.index)
    for trial in ranks.from_first(grid.missing):
        network = _network(config, starts[trial.start], trial, len(train.index.classes))
        labelled = train.samples[subsets[trial.budget][trial.seed]]
        stays = trial.start == START and trial.budget == list(subsets)[-1] and config.protocol == "honest"
        recipe = replace(_recipe(config, starts[trial.start], trial.seed, trial.budget), card=card if stays else None)
        if not run_trial(trial, labelled, network, recipe, data, grid[trial].parent, accelerator, stop):
            return None
        if stays and accelerator.is_main_process:
            keep_best([path.parent for path in grid.values()])
    if accelerator.is_main_process:
        report(config, starts[START], grid, test, _digests(train, test), describe_draw(protocol, by_slide))
    accelerator.wait_for_everyone()
    return accelerator


def _draw(config: FinetuneConfig, protocol: Protocol, labels_N: Any, slides: Sequence[str] | None) -> Subsets:
    if protocol.name == "original":
        return draw_original(protocol, len(labels_N), config.labels, config.seeds, config.held_out or 0.0)
    return draw_subsets(labels_N, config.labels, config.seeds, groups=slides)


def _starts(config: FinetuneConfig) -> dict[str, ResolvedEncoder]:
    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    others = {name: resolve_encoder(name, arch=first.card.arch, **where).beside(first) for name in config.against}
    return {START: first, **others}


def _begin(
    config: FinetuneConfig, train: LabelledSet, test: LabelledSet, starts: Mapping[str, ResolvedEncoder],
    held: ExitStack,
) -> None:  # fmt: skip
    """Claim the folder, and write down what train and test share."""
    kept = {
        k: v
        for k, v in settings.flatten(config).items()
        if not k.startswith(("tracking.", "output_dir", "workers", "note_protocol"))
    }
    weights = [weights_digest(found.encoder, found.card.mean, found.card.std) for found in starts.values()]
    job, record = job_dir(config), job_record(kept, data=_digests(train, test), weights=weights)
    if not job.begin(record, held):
        sides = (side_of(tiles.index, tiles.reader, tiles.title, workers=config.workers) for tiles in (train, test))
        leak = find_leak(*sides, encoders={name: found.card for name, found in starts.items()})
        job.write({**record, "leak": leak})


def job_dir(config: FinetuneConfig) -> JobDir:
    """The job's folder."""
    return JobDir(Path(config.output_dir), RECORD, _changes)


def _digests(*sets: LabelledSet) -> list[str]:
    return [tiles.index.manifest.digest for tiles in sets]


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


def _network(config: FinetuneConfig, start: ResolvedEncoder, trial: Trial, classes: int) -> Classifier:
    torch.manual_seed(trial.seed)
    size = config.image_size or start.card.input_size
    encoder = build_encoder(start.card.arch, config.norm, image_size=size)
    if start.uri != "random":  # that is another one for every seed
        encoder.load_state_dict(start.encoder.state_dict())
    encoder.requires_grad_(config.trains == "all")
    return Classifier(encoder, classes, zero_head=config.protocol == "honest")


def _recipe(config: FinetuneConfig, start: ResolvedEncoder, seed: int, budget: float = 1.0) -> Recipe:
    config = settled(config)
    prepare = Preprocessing(config.image_size or start.card.input_size, start.card.mean, start.card.std)
    names = {f.name for f in dataclasses.fields(Recipe)} & {f.name for f in dataclasses.fields(config)}
    given = {name: getattr(config, name) for name in names if name not in ("augment", "protocol")}
    given["epochs"] = config.epochs or their_epochs(config.trains, budget)
    augment = build_augmentation(config.augment, prepare, seed)
    return Recipe(**given, augment=augment, prepare=prepare, protocol=protocol_of(config), card=None)


def _card(config: FinetuneConfig, start: ResolvedEncoder, index: ShardIndex) -> EncoderCard:
    classes = tuple(index.classes)
    return EncoderCard(
        arch=start.card.arch, feature_dim=start.card.feature_dim, mean=start.card.mean, std=start.card.std,
        input_size=config.image_size or start.card.input_size, manifest_digest=index.manifest.digest, classes=classes,
        predicts=classes, origin=f"{start.uri}, fine-tuned", origin_run_id=start.source_run_id,
        earlier_manifests=start.card.manifests,
    )  # fmt: skip
