"""Settings of ``ca2cl finetune``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.config import OptimConfig, TrackingConfig, check_ranges
from ca2cl.errors import InputError
from ca2cl.evaluation.protocol import ProtocolName
from ca2cl.evaluation.result import ENCODER
from ca2cl.evaluation.splits import check_budgets

Trains = Literal["all", "head"]
Augmentation = Literal["auto", "crop", "ca2cl", "strong", "none"]
OPTIM = OptimConfig(name="sgd", lr=0.01, schedule="cosine_restarts")


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
        check_budgets(self.labels)
        check_ranges(
            self, seeds=Ge(1), epochs=Ge(1), min_steps=Ge(1), batch_size=Ge(2), patience=Ge(1), workers=Ge(0),
            micro_batch_size=Ge(2), held_out=Interval(ge=0, le=0.5), image_size=Ge(32),
        )  # fmt: skip
        if self.optim.name == "lars":
            raise InputError("optim.name is 'lars': it is for large batches without labels; use sgd or adamw")
        if self.protocol == "original" and self.tracking.register_as:
            raise InputError("tracking.register_as is for the honest protocol: this one is for comparison alone")
        if self.protocol == "original" and max(self.labels) > 1:
            raise InputError(f"labels is {max(self.labels)!r}: protocol original draws a share of the labels, up to 1")
        if len({ENCODER, *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice: {', '.join(self.against)}")
