"""``ca2cl report``: one HTML page about a run, which needs no network and no other file."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from ca2cl.common.files import replacing, writing
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.runtime.device import find_device

POSITIONAL = ("run", "out")
MOST_TILES = 10_000
_REMEDY = "give a file in a folder you can write"


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
        for name, least, most in (("tiles", 1, MOST_TILES), ("clusters", 2, 100), ("seed", 0, 2**31 - 1)):
            if not least <= getattr(self, name) <= most:
                raise InputError(f"{name} is {getattr(self, name)!r}: use a number from {least} to {most}")
        if self.workers < 0:
            raise InputError(f"workers is {self.workers!r}: use 0 or more")


def run(config: ReportConfig) -> int:
    """Write the page, say what is missing in it, and log it. Returns the exit code.

    Raises:
        InputError: no such run, shards that were named and cannot be read, an ``out`` that cannot be written.
    """
    from ca2cl.report.material import read_material
    from ca2cl.report.page import build
    from ca2cl.store.run_artifacts import add_artifact

    out = Path(config.out)
    _check_writable(out)
    device = find_device(config.device)
    material = read_material(config.run, config.tracking)
    page = build(config, material, device)
    content = page.html.encode()
    with writing(out, _REMEDY):
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write(content)
    sys.stdout.write("".join(f"missing: {gap}\n" for gap in page.gaps))
    sys.stdout.write(f"report of run {material.run_id} in {out}: {page.tiles} tiles, {len(content) / 1e6:.1f} MB\n")
    sys.stdout.flush()
    if not config.no_log:  # last, so that a store that is away costs no page
        if material.store is None:
            raise InputError(f"{out}: written, but not logged: {material.fault}; or use --no-log")
        add_artifact(material.store, material.run_id, out, "report")
        sys.stdout.write(f"logged to run {material.run_id} as report/{out.name}\n")
    return 0


def _check_writable(out: Path) -> None:
    """Found out before the work and not after it."""
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if out.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"out is {str(out)!r}: cannot be written; {_REMEDY}")
