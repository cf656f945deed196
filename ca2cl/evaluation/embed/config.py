"""Settings of ``ca2cl embed``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import Pooling, TrackingConfig
from ca2cl.errors import InputError
from ca2cl.slides.config import SlideOptions

POSITIONAL = ("source", "out")
SUFFIXES = (".parquet", ".safetensors")
"""Formats of the file of vectors."""


Tokens = Literal["class", "mean", "both", "patch"]


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(SlideOptions):
    """Write an encoder's feature vectors of tiles: one row a tile, with key, label, source and vector.

    With --mpp, the tiles are those of slides: ca2cl embed --encoder RUN slides/ vectors.parquet --mpp 0.5. Their rows
    also have slide, patient, x, y, mpp and side, and NAME.slides.jsonl has a line for each slide.

    Rows are in the order of the shards' index, or of the sorted paths of a folder. Under ``accelerate launch`` the
    processes share the work and write the same file as a single process; all of them must see the folder of ``out``. If
    it is killed, run it again to resume from the parts in OUT.parts. Tiles that do not decode are omitted with a
    warning.
    """

    encoder: str
    """Run id or its first digits, version number, alias (champion, latest), models:/NAME/VERSION, run folder,
    .safetensors file, timm:NAME.TAG, hf-hub:ORG/NAME, torchvision:IMAGENET1K_V1 or random."""
    source: str
    """Tiles: shards (folder or URL), folder of images (nested or not), folder written by datasets.save_to_disk,
    hf:NAME, or module:Class:WHERE for your own source. With --mpp: a slide, a folder or quoted pattern of slides, or a
    CSV."""
    out: str
    """File to write: NAME.parquet, or NAME.safetensors with keys, labels and sources in NAME.keys.jsonl."""
    tokens: tuple[Tokens, ...] = ()
    """class, mean or both: pooling of a ViT's vectors, its class token, the mean of its patch tokens, or one after the
    other; otherwise the encoder's own. patch: also write all patch tokens (rows, columns, features) of every tile; of a
    ResNet, ConvNeXt or Swin its last feature map. patch needs NAME.safetensors."""
    token_dtype: Literal["float16", "float32"] = "float16"
    """Type of patch tokens in the file; vectors are always float32."""
    batch_size: int = 256
    """Tiles in a forward pass. Changes vectors by rounding only."""
    workers: int = 2
    """Decoding processes for each process; 0 decodes in the process itself. Does not affect results."""
    image_size: int | None = None
    """Side in pixels that every tile is resized to; none uses the encoder's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto gives each process of a launch its own GPU."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Autocast precision of the encoder; vectors are always float32."""
    max_bad_rate: float = 0.01
    """Largest share of tiles that may fail to decode (of at least 100 tiles); above it nothing is written."""
    part_size: int = 4096
    """Tiles in a part: the most that each process of a killed job loses, and a row group of the Parquet file."""
    overwrite: bool = False
    """Replace an existing file, and delete the parts of another job in OUT.parts."""
    cache_dir: str | None = None
    """Local folder that caches remote shards; needed for remote shards only."""
    unlabelled: bool = False
    """Ignore labels in folder names or columns."""
    split: str | None = None
    """Split of a Hugging Face dataset or of a CSV of slides; needed if it has several."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset; found by type by default."""
    label_column: str | None = None
    """Label column of a Hugging Face dataset; found by type or name by default."""
    seed: int = 0
    """Seed of the draw of --max_tiles."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the encoder; nothing is logged."""

    @property
    def pooling(self) -> Pooling:
        """Pooling of the vectors."""
        return next((one for one in self.tokens if one != "patch"), "default")

    def __post_init__(self) -> None:
        if Path(self.out).suffix not in SUFFIXES:
            raise InputError(f"out is {self.out!r}: give a file that ends in {' or '.join(SUFFIXES)}")
        if "patch" in self.tokens and Path(self.out).suffix == ".parquet":
            raise InputError(f"out is {self.out!r}: Parquet has no arrays of patch tokens; give NAME.safetensors")
        if len(self.tokens) - self.tokens.count("patch") > 1 or self.tokens.count("patch") > 1:
            raise InputError(
                f"tokens is {' '.join(self.tokens)}: give one of class, mean and both, patch, or one and patch"
            )
        check_ranges(
            self, batch_size=Ge(1), workers=Ge(0), part_size=Interval(ge=1, le=1 << 16), image_size=Ge(32),
            max_bad_rate=Interval(ge=0, le=1), seed=Ge(0),
        )  # fmt: skip
        self.check_slides()
