"""Settings of ``ca2cl heatmap``."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig
from ca2cl.slides.config import SlideOptions, slide_options

POSITIONAL = ("run", "source")
MOST_CLUSTERS = 27


@dataclass(frozen=True, kw_only=True)
class HeatmapConfig(SlideOptions):
    """Lay classes of tiles, or clusters of their vectors, over slides.

    `ca2cl probe` prints the id of its run, and `ca2cl heatmap RUN_ID slide.svs --out maps --mpp 0.5` draws the probe's
    classes. Without labels, `ca2cl heatmap champion "slides/*.svs" --out maps --mpp 0.5 --clusters 6` draws six
    clusters of an encoder's vectors.

    The folder of --out gets SLIDE.png (the slide beside its map) and SLIDE.geojson (for QuPath: File > Import objects
    from file) for each slide, and heatmap.json with the shares of the classes. The vectors stay there, too: the same
    tiles with other clusters or pictures take seconds. Under `ca2cl launch` the processes share the tiles.
    """

    run: str
    """A probe: its run id or the first digits, its JSON, or NAME-classifier.safetensors. A fine-tuned classifier: run
    id, version number, alias, models:/NAME/VERSION, folder, or the folder of the fine-tuning. With --clusters any
    encoder, as `ca2cl embed --encoder` takes it."""
    source: str
    """A slide, a folder or quoted pattern of slides, or a CSV."""
    out: str
    """Folder for the pictures, the GeoJSON files and the vectors."""
    clusters: int | None = None
    """Number of k-means clusters to show in place of classes. They are found over all slides together."""
    encoder: str | None = None
    """Where the encoder of a probe is now, if it was moved. Its weights must be the same."""
    geojson: Literal["tiles", "regions"] = "tiles"
    """tiles: a detection for each tile, with its class and the probabilities of all; regions: an annotation for each
    class, its area in the picture."""
    side: int = 1200
    """Longer side in pixels of a slide in its picture."""
    batch_size: int = 256
    """Tiles in a forward pass."""
    workers: int = 2
    """Decoding processes for each process; 0 decodes in the process itself. Does not affect results."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto gives each process of a launch its own GPU."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of the encoder."""
    split: str | None = None
    """Split of a CSV of slides; needed if it has several."""
    seed: int = 0
    """Seed of k-means and of the draw of --max_tiles."""
    overwrite: bool = False
    """Replace the vectors of another encoder or of other tiles in --out."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the run; nothing is logged."""

    def __post_init__(self) -> None:
        check_ranges(
            self, clusters=Interval(ge=2, le=MOST_CLUSTERS), side=Interval(ge=200, le=8192), batch_size=Ge(1),
            workers=Ge(0), seed=Interval(ge=0, lt=2**31),
        )  # fmt: skip
        options = SlideOptions(**slide_options(self))
        replace(options, mpp=options.mpp or 1.0).check_slides()  # without it, that of the encoder's card is taken
