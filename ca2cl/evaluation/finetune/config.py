"""Settings of ``ca2cl finetune``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import OptimConfig, TrackingConfig
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
    """Fine-tune an encoder on labelled tiles at several label budgets and seeds, and compare it with other starts."""

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    train: str
    """Shards of labelled tiles."""
    test: str
    """Shards of test tiles; their classes must be among those of train. With the honest protocol they are predicted
    once and choose nothing."""
    output_dir: str
    """Folder of the job, with one folder for every cell of the table. Run the same command again to resume."""
    details: bool = False
    """Print the long tables, too: all metrics, differences, recalls, calibration. They are always in
    finetune-results-details.txt."""
    against: tuple[str, ...] = ("random",)
    """Other encoders to fine-tune in the same way and to compare tile by tile; [] fine-tunes only the encoder."""
    labels: tuple[float, ...] = (0.01, 0.1, 1.0)
    """Label budgets: up to 1, a fraction of each class's tiles; above 1, a number of tiles for each class."""
    seeds: int = 5
    """Number of random draws of labelled tiles for every budget: seeds 0, 1, and so on."""
    draw_by: Literal["auto", "tile"] = "auto"
    """How labelled tiles are drawn. auto: whole slides or patients one after another if the shards name them (a tile
    without a name counts as a slide of its own); tile: single tiles."""
    trains: Trains = "all"
    """all: fine-tuning. head: a linear probe on augmented tiles, which trains only the linear layer; BatchNorm follows
    norm."""
    protocol: ProtocolName = "honest"
    """honest, or original: what the method's authors did, for comparison with their tables only. Labels are drawn with
    replacement, and settings left at their defaults take the authors' values. In fine-tuning, held_out is split off all
    training tiles before labels are drawn, and the epoch that is most accurate on it is kept. With trains head, the
    epoch that is most accurate on the test tiles is kept."""
    note_protocol: str | None = None
    """Value of MLflow's tag ca2cl.protocol instead of protocol. Any note, such as "synthetic tissue", excludes the run
    from rankings."""
    epochs: int | None = None
    """Maximum number of epochs on the labelled tiles; none uses 20. Protocol original: 40 up to 10 % of the labels, 10
    with more, 100 for a head."""
    min_steps: int | None = None
    """Minimum number of steps, with more epochs if few tiles are labelled; none uses 200. Protocol original: 1."""
    batch_size: int | None = None
    """Tiles in an optimizer step, over all processes and micro-batches, or all labelled tiles if they are fewer; none
    uses 64. Protocol original: 128."""
    micro_batch_size: int | None = None
    """Maximum number of tiles that a process holds at a time; BatchNorm then sees fewer tiles. none processes its whole
    share of the batch at once."""
    held_out: float | None = None
    """Share of the labelled tiles (whole slides or patients if they are known) that is held out to choose the epoch; 0
    keeps the last epoch. Nothing is held out if a class has too few tiles, or if that would be fewer than 15. none uses
    0.2, also with protocol original."""
    patience: int | None = None
    """Early stopping: evaluations on the held-out tiles (one an epoch or in ten steps) without improvement before
    training ends; none uses 5, also with protocol original."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorm. sync: statistics of the batch over all processes; frozen: the encoder's running statistics,
    unchanged."""
    augment: Augmentation = "auto"
    """Augmentation of labelled tiles. crop: random resized crops; ca2cl: the paper's weak view; strong: its strong
    view; none: no augmentation; auto: crop, or strong with protocol original."""
    image_size: int | None = None
    """Side of the input in pixels; none uses that of the encoder. Weights without one (random, torchvision's) use that
    of the first encoder."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision."""
    workers: int = 2
    """Decoding processes for each training process; 0 decodes in the training process itself."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    optim: OptimConfig = field(default_factory=lambda: OPTIM)
    """Optimizer and schedule; by default SGD and a cosine that restarts every 5 epochs. With protocol original,
    defaults become the authors' values: sgd_plain, lr 3e-4 or 0.01 for a head, no decay."""
    tracking: TrackingConfig = field(default_factory=_tracking)
    """MLflow store of the encoder and of the result. tracking.register_as ca2cl-classifier registers a classifier: of
    those with the most labels, the one that predicts its held-out tiles best."""

    def __post_init__(self) -> None:
        check_budgets(self.labels)
        check_ranges(
            self, seeds=Ge(1), epochs=Ge(1), min_steps=Ge(1), batch_size=Ge(2), patience=Ge(1), workers=Ge(0),
            micro_batch_size=Ge(2), held_out=Interval(ge=0, le=0.5), image_size=Ge(32),
        )  # fmt: skip
        if self.optim.name == "lars":
            raise InputError("optim.name is 'lars': it is for large batches without labels; use sgd or adamw")
        if self.optim.ema is not None:
            raise InputError(f"optim.ema is {self.optim.ema}: it is for pre-training; leave it out")
        if self.protocol == "original" and self.tracking.register_as:
            raise InputError("tracking.register_as is for the honest protocol: this one is for comparison alone")
        if self.protocol == "original" and max(self.labels) > 1:
            raise InputError(f"labels is {max(self.labels)!r}: protocol original draws a share of the labels, up to 1")
        if len({ENCODER, *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice: {', '.join(self.against)}")
