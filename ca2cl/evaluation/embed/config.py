"""Settings of ``ca2cl embed``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.config import TrackingConfig, check_ranges
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.writer import SUFFIXES

POSITIONAL = ("source", "out")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """Vectors of tiles: one row a tile with its key, label, source and vector, in input order.

    Input order is the index's of shards and the sorted paths' of a folder. Under ``accelerate launch`` the processes
    share the work and write the same file as one would; ``out`` must then lie where all of them see it. Killed and
    started again it goes on from the parts in OUT.parts. A tile that does not decode is left out, with a warning.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, torchvision:IMAGENET1K_V1 or random."""
    source: str
    """Tiles: shards (folder or URL), folder of images, nested or not, folder by datasets.save_to_disk, hf:NAME, or
    module:Class:WHERE for a source of your own."""
    out: str
    """File to write: NAME.parquet, or NAME.safetensors with keys, labels and sources in NAME.keys.jsonl."""
    batch_size: int = 256
    """Tiles that go through the encoder at once. Changes vectors by rounding only."""
    workers: int = 2
    """Decoding processes of each process; 0 decodes in it. Never changes a result."""
    image_size: int | None = None
    """Side in pixels that every tile is resized to, whatever its own; none takes the encoder's own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto gives every process of a launch a GPU of its own."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast of the encoder; vectors are float32 in any case."""
    max_bad_rate: float = 0.01
    """Share of tiles that may fail to decode (of 100 tiles at least); with more of them nothing is written."""
    part_size: int = 4096
    """Tiles of a part: what each process of a killed job loses at most, and a row group of the Parquet file."""
    overwrite: bool = False
    """Replace out where it exists, and throw away parts of another job in OUT.parts."""
    cache_dir: str | None = None
    """Local folder in which remote shards are kept. Needed for remote shards only."""
    unlabelled: bool = False
    """Take no labels from folders or columns."""
    split: str | None = None
    """Split of a Hugging Face dataset; needed where it has several."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset; found by type by default."""
    label_column: str | None = None
    """Label column of a Hugging Face dataset; found by type or name by default."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where the encoder is found; nothing is logged."""

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in SUFFIXES:
            raise InputError(f"out is {self.out!r}: give a file that ends in {' or '.join(SUFFIXES)}")
        check_ranges(
            self, batch_size=Ge(1), workers=Ge(0), part_size=Interval(ge=1, le=1 << 16), image_size=Ge(32),
            max_bad_rate=Interval(ge=0, le=1),
        )  # fmt: skip
