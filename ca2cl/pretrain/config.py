"""Settings of ``ca2cl pretrain``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ca2cl.common.ranges import require
from ca2cl.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    ViewsConfig,
)
from ca2cl.pretrain.watch.config import WatchConfig


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The self-supervised method that trains the encoder."""

    name: str = "ca2cl"
    """ca2cl: CA2CL, with the settings of objective; simclr: NT-Xent between the two views, with objective.temperature;
    distill: a frozen encoder's features into model.arch; an installed package's name for a method;
    package.module:Class: your own subclass of ca2cl.methods.base.Method, on the command line only, not in YAML."""
    options: tuple[str, ...] = ()
    """Settings of the method's own, each as NAME=VALUE. distill needs teacher=ENCODER, any form that model.weights
    takes (docs/pretraining.md lists the others)."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train an encoder on shards without labels, and register it in MLflow."""

    data: DataConfig = field(default_factory=DataConfig)
    """Tiles and their order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder and its heads."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """Augmentation: the two views of a tile."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """The self-supervised method."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """CA2CL's loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Size, length and folder of the run."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Measurements on held-out tiles while it trains."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow tracking and registry."""

    def __post_init__(self) -> None:
        run, data = self.run, self.data
        require(
            run.batch_size % data.lanes == 0,
            "run.batch_size",
            run.batch_size,
            f"a batch takes the same number of tiles from each of data.lanes = {data.lanes} lanes; "
            f"use a multiple, such as --run.batch_size {max(1, round(run.batch_size / data.lanes)) * data.lanes}, "
            f"or --data.lanes {math.gcd(run.batch_size, data.lanes)}",
        )
