"""Settings of ``ca2cl pretrain``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ca2cl.config import (
    DataConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    RunConfig,
    TrackingConfig,
    ViewsConfig,
    require,
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A pre-training job."""

    data: DataConfig = field(default_factory=DataConfig)
    """Where the tiles come from and in which order."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The encoder and its heads."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    """How a tile becomes its two views."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    run: RunConfig = field(default_factory=RunConfig)
    """Size, length and folder of the run."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the numbers and the encoder go."""

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
        name, smallest, least = "run.batch_size", run.batch_size, self.objective.least_tiles
        more = f"--run.batch_size {-(-least // data.lanes) * data.lanes}"
        if run.accumulation == "plain" and run.micro_batch_size:
            name, smallest, more = "run.micro_batch_size", run.micro_batch_size, "a larger one"
        require(
            smallest >= least,
            name,
            smallest,
            f"k-means needs at least objective.clusters = {least} tiles; "
            f"use {more}, or --objective.clusters {smallest}",
        )
