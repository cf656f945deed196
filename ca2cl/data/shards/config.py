"""Settings of ``ca2cl shard``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from annotated_types import Ge, Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.errors import InputError
from ca2cl.slides.config import SlideOptions

POSITIONAL = ("source", "out")


@dataclass(frozen=True, kw_only=True)
class ShardConfig(SlideOptions):
    """Write tiles as WebDataset shards with an index and a manifest; from slides, with ``--mpp``.

    If it is killed, run it again to resume.
    """

    source: str
    """Folder of class folders, folder of images, folder written by datasets.save_to_disk, Parquet files, hf:NAME, or
    module:Class:WHERE for your own source (docs/architecture.md). With --mpp: a slide, a folder or quoted pattern of
    slides, or a CSV."""
    out: str
    """Folder for the shards, the index and the manifest."""
    encode: Literal["keep", "jpeg", "webp", "png"] = "keep"
    """keep: the tiles' original bytes, and JPEG for tiles cut from slides; otherwise every tile is encoded in this
    format."""
    quality: int = 95
    """Quality of jpeg and webp, from 1 to 100."""
    resize: int | None = None
    """Resize every tile to this side in pixels; needs --encode other than keep."""
    samples_per_shard: int = 1000
    """Tiles in a shard; the last shard has the rest."""
    workers: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    """Writing processes. Does not affect results."""
    check: Literal["full", "header"] = "full"
    """full: decode every tile once, as training will; header: read only its header, which is faster."""
    bad: Literal["stop", "skip"] = "stop"
    """Tiles that do not decode or have another size. stop: end with an error that names the tile; skip: list it in
    skipped.txt."""
    seed: int = 0
    """Seed of the shuffle, which mixes classes within every shard."""
    unlabelled: bool = False
    """Ignore labels in folder names or columns."""
    check_classes: bool = True
    """Refuse class folders that look like splits (train, test) or like data sets that contain the same classes."""
    group_pattern: str | None = None
    """Regular expression that finds a tile's slide or patient in its path below the source (its first group, if any).
    Files that do not match are counted in a warning, and each counts as a slide of its own."""
    groups: str | None = None
    """CSV with the columns key and group, such as one that ca2cl doctor --leaks writes: slide or patient of the tiles
    with these keys."""
    split: str | None = None
    """Split of a Hugging Face dataset or of a CSV of slides; needed if it has several."""
    image_column: str | None = None
    """Image column of a Hugging Face dataset; found by type by default."""
    label_column: str | None = None
    """Label column of a Hugging Face dataset; found by type or name by default."""
    group_column: str | None = None
    """Column of a Hugging Face dataset with the slide or patient."""

    def __post_init__(self) -> None:
        check_ranges(self, samples_per_shard=Ge(1), workers=Ge(1), quality=Interval(ge=1, le=100), seed=Ge(0))
        self.check_slides()
        if self.resize is not None and self.mpp is not None:
            raise InputError(f"resize is {self.resize}: tiles of slides have the side --tile; set mpp for their scale")
        if self.groups is not None and self.mpp is not None:
            raise InputError(f"groups is {self.groups!r}: tiles of slides have their slide; leave it out")
        if self.resize is not None and (self.resize < 1 or self.encode == "keep"):
            raise InputError(f"resize is {self.resize}: use a positive number and --encode jpeg, webp or png")
