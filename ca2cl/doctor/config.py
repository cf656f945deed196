"""Settings of ``ca2cl doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from annotated_types import Ge, Gt

from ca2cl.common.ranges import check_ranges
from ca2cl.config import ModelConfig, RunConfig, TrackingConfig, ViewsConfig


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check the machine, a job's data and the ranks of a launch; print problems with remedies.

    ``ca2cl doctor`` checks the machine. ``--shards FOLDER`` also checks the sample order and the speed of reading
    tiles. Under ``accelerate launch`` it also checks whether the processes can communicate. ``--views SHARDS OUT.png``
    draws tiles beside their augmented views. ``--leaks A B`` finds slides, tiles and altered copies of tiles that two
    sets of shards share. ``--plan`` prints the memory of each process of a pre-training job, with
    the settings of ca2cl pretrain (see ca2cl doctor plan --help).
    """

    shards: str | None = None
    """Shard folder of the planned job."""
    batch_size: int = 256
    """run.batch_size of the planned job."""
    lanes: int = 64
    """data.lanes of the planned job."""
    processes: int = 1
    """Number of processes of the planned job; under a launcher, the number that was started."""
    micro_batch_size: int | None = None
    """run.micro_batch_size of the planned job."""
    accumulation: Literal["exact", "plain", "bitwise"] = RunConfig.accumulation
    """run.accumulation of the planned job."""
    arch: str = ModelConfig.arch
    """model.arch of the planned job."""
    norm: Literal["sync", "frozen", "lane_group"] = ModelConfig.norm
    """model.norm of the planned job."""
    norm_group: int = ModelConfig.norm_group
    """model.norm_group of the planned job."""
    norm_block: int = ModelConfig.norm_block
    """model.norm_block of the planned job."""
    workers: int = 2
    """data.workers of the planned job."""
    recipe: Literal["ca2cl", "crop"] = "ca2cl"
    """Recipe of the planned job, as for ca2cl pretrain: the job then has its settings. ca2cl or crop: views.recipe
    alone."""
    pretrain_recipe: str | None = None
    """Recipe that the next commands name; --recipe sets it where it names one of ca2cl pretrain."""
    strength: float = ViewsConfig.strength
    """views.strength of the planned job."""
    crop_scale: tuple[float, float] = ViewsConfig.crop_scale
    """views.crop_scale of the planned job."""
    image_size: int = 224
    """data.image_size of the planned job: side of the views in pixels."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    views: tuple[str, str] | None = None
    """Only draw a sheet of views: the shard folder, and the PNG file to write."""
    count: int = 8
    """Number of tiles on the sheet of views."""
    leaks: tuple[str, str] | None = None
    """Only compare two sets of shards, A and B: slides, equal tiles and altered copies that both have. Exit code 1 if
    there are any. The same folder twice looks for copies within it."""
    leaks_output: str = "leaks"
    """Folder for what --leaks finds: leaks.json, pairs.csv, groups-a.csv and groups-b.csv for ca2cl shard --groups, and
    a sheet of pairs."""
    patience: float = 60.0
    """Seconds that the processes of a launch may take to find one another (training allows half an hour)."""
    tracking_uri: str | None = None
    """tracking.uri of the planned job: the MLflow store to check; none uses MLFLOW_TRACKING_URI or the embedded
    store."""
    tracking_root: str = TrackingConfig.root
    """tracking.root of the planned job: folder of the embedded store."""

    def __post_init__(self) -> None:
        check_ranges(
            self, batch_size=Ge(1), lanes=Ge(1), processes=Ge(1), count=Ge(1), patience=Gt(0), image_size=Ge(32)
        )
