"""Settings of a training: engine, head and schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from annotated_types import Ge, Gt, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import OptimConfig
from ca2cl.errors import InputError

EngineName = Literal["torchvision", "detectron2"]
EngineChoice = EngineName | Literal["auto"]
Head = Literal["mask_rcnn_fpn", "mask_rcnn_c4", "retinanet_fpn"]
"""Mask R-CNN on a feature pyramid; on res4 with res5 as its box head and the extra norm after it (the MoCo protocol's
C4); RetinaNet, which has no masks."""


def has_masks(head: Head) -> bool:
    """True where a detector with this head finds masks, and needs them to learn from."""
    return head != "retinanet_fpn"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how a detector is trained; counts are global, over all processes."""

    iterations: int
    """Optimizer steps."""
    batch_size: int
    """Images a step."""
    lr: float
    warmup: int
    """Steps in which the rate rises linearly to ``lr``."""
    milestones: tuple[int, ...]
    """Steps after which it is divided by 10."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    weight_decay: float = 1e-4
    momentum: float = 0.9
    layer_decay: float | None = None
    """Factor on the rate from one layer of the body to the one before it (Li et al., arXiv 2203.16527, appendix A.2);
    None: one rate for all."""
    train_sides: tuple[int, ...] = (800,)
    """Shorter sides in pixels that a training image is resized to, one drawn at random."""
    test_side: int = 800
    longest_side: int = 1333
    """Most pixels of the longer side; the shorter one gives way."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    sync_norm: bool = True
    """BatchNorm trained, over all processes; False keeps it as the encoder has it."""
    precise_norm: bool = False
    """Statistics estimated again over training images before an evaluation, with the weights held."""
    frozen_stages: int = 0
    """Stem and stages (of a ViT: blocks) that are not trained, from the input: 2 is detectron2's default, 0 the MoCo
    protocol's."""
    checkpoint_every: int = 1000
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(
            self, iterations=Ge(1), batch_size=Ge(1), test_side=Ge(1), checkpoint_every=Ge(1), warmup=Ge(0),
            weight_decay=Ge(0), momentum=Ge(0), evaluate_every=Ge(0), lr=Gt(0), train_sides=Ge(1),
            layer_decay=Interval(gt=0, le=1), frozen_stages=Ge(0),
        )  # fmt: skip
        if list(self.milestones) != sorted({step for step in self.milestones if 0 < step < self.iterations}):
            raise InputError(f"milestones is {self.milestones}: use rising steps between 0 and {self.iterations}")
        if not self.train_sides:
            raise InputError(f"train_sides is {self.train_sides}: use one or more numbers of pixels")
        if self.longest_side < max(self.test_side, *self.train_sides):
            raise InputError(f"longest_side is {self.longest_side}: use at least the longest of the shorter sides")

    @property
    def optim(self) -> OptimConfig:
        """Its part that ``detector_optimizer`` takes."""
        return OptimConfig(
            name="adamw" if self.optimizer == "adamw" else "sgd_plain", lr=self.lr, weight_decay=self.weight_decay,
            momentum=self.momentum, layer_decay=self.layer_decay,
        )  # fmt: skip

    @property
    def precise_steps(self) -> int:
        """Batches that precise statistics are taken over: 200 at most, detectron2's TEST.PRECISE_BN.NUM_ITER, and no
        more than are trained on, for a short trial must not spend most of its time here. 0: none."""
        return min(200, self.iterations) if self.precise_norm else 0
