"""Settings of ``ca2cl embed``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ca2cl.config import TrackingConfig
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
        for name, least, most in (("batch_size", 1, None), ("workers", 0, None), ("part_size", 1, 1 << 16)):
            value = getattr(self, name)
            if value < least or (most is not None and value > most):
                raise InputError(f"{name} is {value!r}: use {least} or more{f', up to {most}' if most else ''}")
        if not 0 <= self.max_bad_rate <= 1:
            raise InputError(f"max_bad_rate is {self.max_bad_rate!r}: use a share from 0 to 1")
        if self.image_size is not None and self.image_size < 32:
            raise InputError(f"image_size is {self.image_size!r}: use at least 32 pixels")
