"""Settings of ``ca2cl report``."""

from __future__ import annotations

from dataclasses import dataclass, field

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError

POSITIONAL = ("run", "out")
MOST_TILES = 10_000


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one self-contained HTML page about a pre-training run.

    It has curves, a sheet of views, nearest neighbours, a map of the embeddings, k-means clusters and where they lie on
    the slides, downstream results with their baselines, configuration and lineage. An empty section names the command
    that fills it. A run that is in progress or has failed has a page as well. The page is also stored with the run in
    MLflow, under report/.
    """

    run: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, or a run's folder."""
    out: str
    """HTML file to write; an existing file is replaced."""
    shards: str | None = None
    """Shards that the run was trained on, folder or URL; none uses the run's data.shards."""
    test: str | None = None
    """Shards of other tiles to show instead, which the encoder has not seen. If they are labelled, the page shows how
    well neighbours and clusters agree with the classes."""
    tiles: int = 2000
    """Maximum number of tiles that are embedded and shown; drawn by seed, stratified by class."""
    clusters: int = 10
    """Number of k-means clusters."""
    seed: int = 0
    """Seed of the drawn tiles, the queries, the clusters and the map."""
    no_log: bool = False
    """Only write the file; do not store it with the run in MLflow."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Decoding processes; 0 decodes in the main process. Does not affect the page."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the run, where the page is also stored."""

    def __post_init__(self) -> None:
        if not self.out.endswith((".html", ".htm")):
            raise InputError(f"out is {self.out!r}: give a file that ends in .html")
        check_ranges(
            self, tiles=Interval(ge=1, le=MOST_TILES), clusters=Interval(ge=2, le=100), seed=Interval(ge=0, lt=2**31),
            workers=Ge(0),
        )  # fmt: skip
