"""``ca2cl finetune``: the whole encoder trained on labelled tiles, at several label budgets, beside other starts."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from ca2cl import config as settings
from ca2cl.common.files import write_atomic
from ca2cl.common.job_dir import changed, hold_job, other_job
from ca2cl.common.records import parse_json
from ca2cl.config import OptimConfig, TrackingConfig
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import open_pair
from ca2cl.evaluation.embed.job import weights_digest
from ca2cl.evaluation.finetune.best_checkpoint import keep_best
from ca2cl.evaluation.finetune.original import OPTIM, Trains, draw_original, protocol_of, settled, their_epochs
from ca2cl.evaluation.finetune.report import RECORD, report
from ca2cl.evaluation.finetune.step import Augmentation, LabelledSet, Preprocessing, build_augmentation
from ca2cl.evaluation.finetune.trial import RESULT, Cell, Data, Recipe, run_cell
from ca2cl.evaluation.leakage import find_leak, side_of
from ca2cl.evaluation.protocol import Protocol, ProtocolName, describe_draw
from ca2cl.evaluation.splits import Subsets, check_budget, draw_subsets, known_slides
from ca2cl.models.classifier import Classifier
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.models.resnet import build_encoder
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.launched import under_deepspeed
from ca2cl.runtime.precision import check_precision
from ca2cl.runtime.signals import StopFlag

if TYPE_CHECKING:
    from ca2cl.registry.resolve import ResolvedEncoder

START = "encoder"
_FREE = frozenset({"train", "test", "cache_dir"})
"""Settings of the record that say where data lie, not which."""
REMEDY = "free some space, or give another output_dir"


def _tracking() -> TrackingConfig:
    return TrackingConfig(register_as=None)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Fine-tuning of an encoder on labelled tiles."""

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    train: str
    """Shards with the labelled tiles."""
    test: str
    """Shards with the test tiles; their classes must be among those of train. By the honest protocol predicted once,
    and never used to choose."""
    output_dir: str
    """Folder of the job, one folder in it for every cell of the table. A job started again goes on."""
    against: tuple[str, ...] = ("random",)
    """Other encoders that are fine-tuned in the same way, and that the first one is compared with tile by tile; []
    fine-tunes it alone."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Label budgets: a fraction of each class's tiles up to 1, or a whole number of tiles a class above 1."""
    seeds: int = 5
    """Draws of the labelled tiles for every budget: seeds 0, 1, and so on."""
    draw_by: Literal["auto", "tile"] = "auto"
    """What labels are drawn by. auto: whole slides or patients one after another, where the shards name
    them (a tile without one is a slide of its own); tile: single tiles."""
    trains: Trains = "all"
    """all: fine-tuning; head: a linear probe on augmented tiles, which trains the linear layer alone, while BatchNorm
    follows norm."""
    protocol: ProtocolName = "honest"
    """honest, or original: what the method's authors did, to be compared with their tables and with nothing else.
    Labels are drawn with replacement, and what is left at its default below is theirs. In fine-tuning held_out is split
    off all training tiles before labels are drawn, and its most accurate epoch is kept; with trains head the epoch that
    is most accurate on the test tiles is."""
    note_protocol: str | None = None
    """MLflow's tag ca2cl.protocol instead of that: any note, such as made-up tissue, keeps the run from ranking."""
    epochs: int | None = None
    """Most passes over the labelled tiles; none takes 20, or theirs: 40 up to 10 % of the labels, 10 with more, 100 for
    a head."""
    min_steps: int | None = None
    """Steps that a cell has at least, in more passes where few tiles are labelled; none takes 200, or 1 as theirs."""
    batch_size: int | None = None
    """Tiles in an optimizer step, over all processes and micro-batches, or all labelled tiles where they are fewer;
    none takes 64, or 128 as theirs."""
    micro_batch_size: int | None = None
    """Most tiles that one process holds at a time; none takes its whole share of the batch at once. BatchNorm then sees
    fewer tiles."""
    held_out: float | None = None
    """Share of the labelled tiles, whole slides or patients where they are known, that decides which epoch's weights
    are taken; 0 takes the last. None is held out where a class has too few, or fewer than 15 would be. Left out: 0.2,
    as theirs."""
    patience: int | None = None
    """Looks at the held-out tiles, one an epoch or in ten steps, that may be no better before training ends; none takes
    5, as theirs."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorm. sync: statistics of the batch, over all processes; frozen: the encoder's own, unchanged."""
    augment: Augmentation = "auto"
    """How labelled tiles are augmented. crop: random resized crops; ca2cl: the paper's weak view; strong: its strong
    view; none: not at all; auto: crop, or strong as theirs."""
    image_size: int | None = None
    """Side in pixels that an encoder sees; none takes its own, and the first encoder's for weights that come without
    one (random, torchvision's)."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    optim: OptimConfig = field(default_factory=lambda: OPTIM)
    """Optimizer and schedule; by default SGD and a cosine that starts again every 5 epochs. By protocol original what
    is left at its default is theirs: sgd_plain, lr 3e-4 or 0.01 for a head, no decay."""
    tracking: TrackingConfig = field(default_factory=_tracking)
    """Where the encoder is found and the result is logged. tracking.register_as ca2cl-classifier registers the
    classifier that predicts its held-out tiles best, of those with the most labels."""

    def __post_init__(self) -> None:
        if not self.labels:
            raise InputError("labels is empty: give at least one budget, such as 0.1")
        for budget in self.labels:
            check_budget(budget)
        least = {"seeds": 1, "epochs": 1, "min_steps": 1, "batch_size": 2, "patience": 1, "workers": 0}
        for name, value in least.items():
            given = getattr(self, name)
            if given is not None and given < value:
                raise InputError(f"{name} is {getattr(self, name)!r}: use {value} or more")
        if self.micro_batch_size is not None and self.micro_batch_size < 2:
            raise InputError(f"micro_batch_size is {self.micro_batch_size!r}: use 2 or more")
        if self.held_out is not None and not 0 <= self.held_out <= 0.5:
            raise InputError(f"held_out is {self.held_out!r}: use a share from 0 to 0.5")
        if self.image_size is not None and self.image_size < 32:
            raise InputError(f"image_size is {self.image_size!r}: use at least 32 pixels")
        if self.optim.name == "lars":
            raise InputError("optim.name is 'lars': it is for large batches without labels; use sgd or adamw")
        if self.protocol == "original" and self.tracking.register_as:
            raise InputError("tracking.register_as is for the honest protocol: this one is for comparison alone")
        if self.protocol == "original" and max(self.labels) > 1:
            raise InputError(f"labels is {max(self.labels)!r}: protocol original draws a share of the labels, up to 1")
        if len({START, *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice: {', '.join(self.against)}")


def run(config: FinetuneConfig, last: bool = True) -> int:
    """Fine-tune every cell that is not done yet, print the table, log the MLflow run. Returns the exit code: 0, or 85
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
        raise InputError("finetune does not run under DeepSpeed: a cell is a small job; use a DDP configuration")
    stop = StopFlag().install()
    indexes = open_pair(config.train, config.test, config.cache_dir)
    starts = _starts(config)
    with stop.joining():
        accelerator = build_accelerator()
    check_precision(config.precision, accelerator.device, "precision")
    out = Path(config.output_dir)
    digests = [index.manifest.digest for index in indexes]
    train, test = (
        LabelledSet(index, ShardReader(root, config.cache_dir), np.flatnonzero(index.labels() >= 0), title)
        for root, index, title in zip((config.train, config.test), indexes, ("train", "test"), strict=True)
    )
    problem = _from_first(_claim(out, config, digests, train, test, starts) if accelerator.is_main_process else "")
    problem = problem or _from_first(hold_job(out, held) if accelerator.is_main_process else "")
    if problem:
        raise InputError(problem)
    groups, protocol = train.index.groups(), protocol_of(config)
    told = config.train if accelerator.is_main_process else ""
    slides = known_slides([groups[sample] for sample in train.samples], told)
    data = Data(train, test, train.index.labels(), groups, by_slide=slides is not None)
    by_slide = slides is not None and config.draw_by == "auto" and not protocol.replacement
    subsets = _draw(config, protocol, data.labels[train.samples], slides if by_slide else None)
    cells = [Cell(*cell) for cell in itertools.product(starts, subsets, range(config.seeds))]
    card = _card(config, starts[START], train.index)
    for cell in cells:
        folder = out / "cells" / cell.folder
        if _from_first((folder / RESULT).exists()):
            continue
        network = _network(config, starts[cell.start], cell, len(train.index.classes))
        labelled = train.samples[subsets[cell.budget][cell.seed]]
        stays = cell.start == START and cell.budget == list(subsets)[-1] and config.protocol == "honest"
        recipe = replace(_recipe(config, starts[cell.start], cell.seed, cell.budget), card=card if stays else None)
        if not run_cell(cell, labelled, network, recipe, data, folder, accelerator, stop):
            return None
        if stays and accelerator.is_main_process:
            keep_best([out / "cells" / one.folder for one in cells])
    if accelerator.is_main_process:
        report(config, starts[START], out, cells, test, digests, describe_draw(protocol, by_slide))
    accelerator.wait_for_everyone()
    return accelerator


def _draw(config: FinetuneConfig, protocol: Protocol, labels_N: Any, slides: Sequence[str] | None) -> Subsets:
    if protocol.name == "original":
        return draw_original(protocol, len(labels_N), config.labels, config.seeds, config.held_out or 0.0)
    return draw_subsets(labels_N, config.labels, config.seeds, groups=slides)


def _starts(config: FinetuneConfig) -> dict[str, ResolvedEncoder]:
    from ca2cl.registry.resolve import resolve_encoder

    where: dict[str, Any] = {"tracking_uri": config.tracking.uri, "root": config.tracking.root}
    first = resolve_encoder(config.encoder, **where)
    others = {name: resolve_encoder(name, arch=first.card.arch, **where).beside(first) for name in config.against}
    return {START: first, **others}


def _claim(
    out: Path, config: FinetuneConfig, digests: Sequence[str], train: LabelledSet, test: LabelledSet,
    starts: Mapping[str, ResolvedEncoder],
) -> str:  # fmt: skip
    """Write what the folder's job is and what train and test share, or compare with what it was; what is wrong, or
    nothing."""
    kept = {
        k: v
        for k, v in settings.flatten(config).items()
        if not k.startswith(("tracking.", "output_dir", "workers", "note_protocol"))
    }
    weights = {name: weights_digest(found.encoder, found.card.mean, found.card.std) for name, found in starts.items()}
    content: dict[str, Any] = {"settings": kept, "data": list(digests), "weights": list(weights.values())}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path = out / RECORD
    try:
        if path.exists():
            held = parse_json(path.read_text(encoding="utf-8"))
            changes = _changes(held, content)
            return other_job(out, changes) if changes else ""
        if out.exists() and any(out.iterdir()):
            return f"output_dir {str(out)!r} is not empty and holds no fine-tuning job: use another folder"
        out.mkdir(parents=True, exist_ok=True)
        sides = (side_of(tiles.index, tiles.reader, tiles.title, workers=config.workers) for tiles in (train, test))
        content["leak"] = find_leak(*sides, encoders={name: found.card for name, found in starts.items()})
        write_atomic(path, (json.dumps({"digest": digest, **content}, indent=1) + "\n").encode(), REMEDY)
    except (OSError, ValueError, KeyError) as error:
        return f"output_dir {str(out)!r} cannot be used ({error}); give a folder you can write"
    return ""


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


def _from_first(value: Any) -> Any:
    """Rank 0's value on every rank."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def _network(config: FinetuneConfig, start: ResolvedEncoder, cell: Cell, classes: int) -> Classifier:
    torch.manual_seed(cell.seed)
    encoder = build_encoder(start.card.arch, config.norm)
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
