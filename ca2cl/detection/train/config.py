"""Settings of ``ca2cl detect``, and the published schedules."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Literal, NamedTuple

from annotated_types import Ge, Gt, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig
from ca2cl.detection.engines.settings import EngineChoice, Head, Schedule
from ca2cl.errors import InputError

DataSet = Literal["glas", "crag", "coco"]


class _Published(NamedTuple):
    """How the method's authors train on a data set: the configurations of their repository."""

    iterations: int
    milestones: tuple[int, ...]
    train_sides: tuple[int, ...]
    test_side: int


_PUBLISHED = {
    "glas": _Published(5_000, (4_000,), tuple(range(400, 522 + 1)), 522),
    "crag": _Published(15_000, (10_000, 13_000), tuple(range(768, 1_024 + 1)), 768),
    "coco": _Published(90_000, (60_000, 80_000), (640, 672, 704, 736, 768, 800), 800),  # detectron2's 1x
}


class _Rates(NamedTuple):
    lr: float
    weight_decay: float


# of torchvision and detectron2 for ResNets; of Swin, ConvNeXt and ViTDet for AdamW
_RATES = {"auto": _Rates(0.02, 1e-4), "sgd": _Rates(0.02, 1e-4), "adamw": _Rates(1e-4, 0.05)}


@dataclass(frozen=True, kw_only=True)
class DetectConfig:
    """Train a gland detector from an encoder on one split, and score it on the others.

    Related verbs: `detect prepare` converts images with masks to COCO files; `detect predict` applies a trained
    detector to a folder of images.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    dataset: DataSet
    """Data set, which sets schedule and image sizes: glas (5,000 iterations at 400 to 522 pixels), crag (15,000 at 768
    to 1,024), or coco for any COCO files of instances (90,000 at 640 to 800, so set iterations)."""
    data: str
    """Folder written by `ca2cl detect prepare`. For glas and crag also the unzipped archive, which is then prepared in
    output_dir/data."""
    output_dir: str
    """Folder of the job, with one folder for every training. Run the same command again to resume."""
    against: tuple[str, ...] = ("random",)
    """Other encoders to train detectors from in the same way; [] trains from the first only."""
    seeds: int = 1
    """Number of trainings from every encoder: seeds 0, 1, and so on. Use 5 for a meaningful comparison."""
    engine: EngineChoice = "auto"
    """Library that builds and trains the detector: torchvision or detectron2; auto: detectron2 if it is installed."""
    head: Head = "mask_rcnn_fpn"
    """mask_rcnn_fpn; mask_rcnn_c4 (engine detectron2 only); or retinanet_fpn, which has no masks."""
    times: float = 1.0
    """Length of the training as a multiple of the published schedule, such as 0.5, 2 or 3."""
    iterations: int | None = None
    """Optimizer steps; none uses the published number multiplied by `times`."""
    batch_size: int = 16
    """Images in an optimizer step, over all processes."""
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    """sgd: momentum .9, decay 1e-4; adamw: decay .05, but not of norms, biases and position embeddings; auto: sgd for
    an encoder with BatchNorm, adamw for one without, as the authors of either train them."""
    lr: float | None = None
    """Peak learning rate; change it together with batch_size. none uses .02 with sgd, 1e-4 with adamw."""
    layer_decay: float | None = None
    """Factor on the learning rate from one layer of the encoder to the one before it, .7 to .9 for a ViT; none: one
    rate for all."""
    warmup: int = 1_000
    """Warm-up steps; at most a fifth of the iterations."""
    train_sides: tuple[int, ...] = ()
    """Shorter sides in pixels to resize training images to, one drawn at random; [] uses the published ones."""
    test_side: int | None = None
    """Shorter side of scored images in pixels; none uses the published one."""
    longest_side: int = 1333
    """Maximum of the longer side in pixels."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision."""
    norm: Literal["sync", "frozen"] = "sync"
    """BatchNorm. sync: trained, with statistics over all processes; frozen: the encoder's, unchanged, and none in the
    pyramid."""
    precise_norm: bool = True
    """Estimate BatchNorm statistics again with fixed weights before a detector is scored, over 200 batches or, if
    fewer, as many as it was trained on."""
    frozen_stages: int = 0
    """Stages that are not trained, counted from the input: 0 none, 1 the stem, 5 the stem and all four stages of a
    ResNet, ConvNeXt or Swin. The stages of a ViT are its blocks."""
    checkpoint_every: int = 500
    """Optimizer steps between checkpoints."""
    evaluate_every: int = 0
    """Optimizer steps between evaluations during training, for the curves only; 0 evaluates only at the end."""
    min_score: float = 0.5
    """Minimum score of a detection to count for F1, Dice and Hausdorff, and to be drawn."""
    workers: int = 2
    """Processes that read images for each training process; 0 reads in the training process."""
    tracking: TrackingConfig = field(default_factory=partial(TrackingConfig, register_as=None))
    """Where encoders are found and results are logged."""

    def __post_init__(self) -> None:
        check_ranges(self, seeds=Ge(1), times=Gt(0), iterations=Ge(1), workers=Ge(0), min_score=Interval(gt=0, lt=1))
        if self.tracking.register_as:
            raise InputError("tracking.register_as is for encoders and classifiers; detectors are kept in output_dir")
        if len({"encoder", *self.against}) < len(self.against) + 1:
            raise InputError(f"against names one encoder twice: {', '.join(self.against)}")
        self.schedule(0)

    def resolved(self, *, batch_norm: bool) -> DetectConfig:
        """These settings with optimizer and rate for an encoder with or without BatchNorm."""
        optimizer = self.optimizer
        if optimizer == "auto":
            optimizer = "sgd" if batch_norm else "adamw"
        return replace(self, optimizer=optimizer, lr=self.lr or _RATES[optimizer].lr)

    def schedule(self, seed: int) -> Schedule:
        """The schedule of one training.

        Raises:
            InputError: a setting is out of its range.
        """
        published = _PUBLISHED[self.dataset]
        iterations = self.iterations or max(1, round(published.iterations * self.times))
        scale = iterations / published.iterations
        milestones = sorted({round(step * scale) for step in published.milestones} - {0, iterations})
        shared = {one.name for one in fields(Schedule)} & vars(self).keys()
        given = {name: getattr(self, name) for name in shared} | {
            "iterations": iterations,
            "warmup": min(self.warmup, iterations // 5),
            "milestones": tuple(milestones),
            "train_sides": self.train_sides or published.train_sides,
            "test_side": self.test_side or published.test_side,
            "precise_norm": self.precise_norm and self.norm == "sync",
            "optimizer": "adamw" if self.optimizer == "adamw" else "sgd",
            "lr": _RATES[self.optimizer].lr if self.lr is None else self.lr,
            "weight_decay": _RATES[self.optimizer].weight_decay,
        }
        return Schedule(**given, sync_norm=self.norm == "sync", seed=seed)
