"""Settings of ``ca2cl doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from annotated_types import Ge, Gt

from ca2cl.config import ModelConfig, RunConfig, TrackingConfig, check_ranges


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Look at the machine, at a job's data and at the ranks of a launch, and say what is wrong and what to do about it.

    ``ca2cl doctor`` checks the machine; ``--shards FOLDER`` also the order of samples and whether tiles come fast
    enough; under ``accelerate launch`` also whether the processes reach one another. ``--views SHARDS OUT.png`` draws a
    sheet of tiles beside the views that training would see.
    """

    shards: str | None = None
    """Shard folder of the job that is planned."""
    batch_size: int = 256
    """Its run.batch_size."""
    lanes: int = 64
    """Its data.lanes."""
    processes: int = 1
    """How many processes it will have; under a launcher, as many as were started."""
    micro_batch_size: int | None = None
    """Its run.micro_batch_size."""
    accumulation: Literal["exact", "plain", "bitwise"] = RunConfig.accumulation
    """Its run.accumulation."""
    arch: str = ModelConfig.arch
    """Its model.arch."""
    norm: Literal["sync", "frozen", "lane_group"] = ModelConfig.norm
    """Its model.norm."""
    norm_group: int = ModelConfig.norm_group
    """Its model.norm_group."""
    norm_block: int = ModelConfig.norm_block
    """Its model.norm_block."""
    workers: int = 2
    """Its data.workers."""
    recipe: Literal["ca2cl", "crop"] = "ca2cl"
    """View recipe: ca2cl or crop."""
    image_size: int = 224
    """Side of the views in pixels."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    views: tuple[str, str] | None = None
    """Only draw a sheet of views: shard folder, and the PNG to write."""
    count: int = 8
    """Tiles on the sheet."""
    patience: float = 60.0
    """Seconds that the processes of a launch have to reach one another: not the half hour that training grants."""
    tracking_uri: str | None = None
    """Its tracking.uri: which MLflow store must answer; none takes MLFLOW_TRACKING_URI, or the embedded store."""
    tracking_root: str = TrackingConfig.root
    """Its tracking.root: folder of the embedded store."""

    def __post_init__(self) -> None:
        check_ranges(
            self, batch_size=Ge(1), lanes=Ge(1), processes=Ge(1), count=Ge(1), patience=Gt(0), image_size=Ge(32)
        )
