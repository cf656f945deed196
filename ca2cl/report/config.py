"""Settings of ``ca2cl report``."""

from __future__ import annotations

from dataclasses import dataclass, field

from annotated_types import Ge, Interval

from ca2cl.config import TrackingConfig, check_ranges
from ca2cl.errors import InputError

POSITIONAL = ("run", "out")
MOST_TILES = 10_000


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """One self-contained HTML page about a pre-training run.

    Curves, a sheet of views, nearest neighbours, a map of the embeddings, k-means clusters, downstream results with
    their floors, configuration and lineage. What there is nothing to show of says so, with the command that makes it;
    a run that still goes on or failed has a page as well. The page is kept with the run in MLflow, under report/.
    """

    run: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, or a run's folder."""
    out: str
    """HTML file to write; one that is there is replaced."""
    shards: str | None = None
    """Shards that the run was trained on, folder or URL; none takes the run's own data.shards."""
    test: str | None = None
    """Shards of other tiles to show in place of those: the encoder has not seen them, and with labels the page says
    how well neighbours and clusters meet the classes."""
    tiles: int = 2000
    """Most tiles that are embedded and shown; drawn by seed, every class with its share."""
    clusters: int = 10
    """Clusters of k-means."""
    seed: int = 0
    """Of the tiles drawn, the queries, the clusters and the map."""
    no_log: bool = False
    """Only write the file: do not copy it to the run in MLflow."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    workers: int = 2
    """Decoding processes; 0 decodes in this one. Never changes the page."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the run is found and the page is logged."""

    def __post_init__(self) -> None:
        if not self.out.endswith((".html", ".htm")):
            raise InputError(f"out is {self.out!r}: give a file that ends in .html")
        check_ranges(
            self, tiles=Interval(ge=1, le=MOST_TILES), clusters=Interval(ge=2, le=100), seed=Interval(ge=0, lt=2**31),
            workers=Ge(0),
        )  # fmt: skip
