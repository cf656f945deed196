"""Settings of ``ca2cl detect prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ca2cl.detection.coco.fragment_rule import FragmentRule
from ca2cl.errors import InputError, nearest

DATASETS = ("glas", "crag", "masks")
POSITIONAL = ("dataset", "source", "out")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Convert images with masks of gland instances to COCO files, one for each published split.

    OUT gets SPLIT.json and a folder SPLIT with exact copies of the images; it appears when it is complete. Masks become
    run lengths, which store them exactly, with holes. Patients and grades are read from a Grade.csv, index.csv or
    patients.csv (columns name, patient_id, grade) beside the images.
    """

    dataset: str
    """glas: the unzipped GlaS, train_N, testA_N, testB_N and NAME_anno, BMP or PNG. crag: train and valid, each with
    Images and Annotation. masks: any folder of images beside a folder of masks of the same names, or one such pair for
    each split. A mask has one channel of 8, 16 or 32 bits: one number for each instance, 0 between them."""
    source: str
    """Folder of the unzipped archive."""
    out: str
    """New or empty folder to write."""
    images: str = "images"
    """Name of the image folders, for dataset masks."""
    masks: str = "masks"
    """Name of the mask folders, for dataset masks."""
    min_area: int = FragmentRule.min_area
    """Minimum area in pixels: smaller instances are dropped, and so are smaller separate parts of larger instances."""
    max_loss: float = FragmentRule.max_loss
    """Largest share of an instance's pixels that may be dropped with such parts."""
    apart: Literal["stop", "keep", "split"] = "stop"
    """If most numbers mark several separate parts, as in masks of classes. stop: end with an error; keep: a number is
    still one instance; split: every connected part of a number is an instance, in all masks."""
    preview: str | None = None
    """PNG file to draw: a dozen images with their converted masks. Look at it before training."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise InputError(f"dataset is {self.dataset!r}: {nearest(self.dataset.lower(), DATASETS)}")
        FragmentRule(self.min_area, self.max_loss)
        if self.preview is not None and Path(self.preview).suffix.lower() != ".png":
            raise InputError(f"preview is {self.preview!r}: give the name of a .png file")
        for name in ("images", "masks"):
            if not getattr(self, name) or "/" in getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}: give a folder's name, without /")
