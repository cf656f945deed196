"""Settings of ``ca2cl detect prepare``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ca2cl.detection.coco.instances import FragmentRule
from ca2cl.detection.prepare.layouts import DATASETS
from ca2cl.errors import InputError, nearest

POSITIONAL = ("dataset", "source", "out")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn images with masks of gland instances into COCO files, one for each published split.

    OUT gets SPLIT.json and a folder SPLIT with copies of the images, byte for byte, and appears when all of it is
    there. Masks become run lengths, which hold them exactly, holes included. Patients and grades are taken from a
    Grade.csv, index.csv or patients.csv (columns name, patient_id, grade) beside the images.
    """

    dataset: str
    """glas: train_N, testA_N, testB_N and NAME_anno, BMP or PNG, as GlaS unzips. crag: train and valid, each with
    Images and Annotation. masks: any folder of images beside one of masks of the same names, or such pairs in one
    folder a split. A mask is one channel, 8, 16 or 32 bits, one number an instance, 0 between them."""
    source: str
    """The folder that the archive was unzipped to."""
    out: str
    """A folder that is not there yet, or is empty."""
    images: str = "images"
    """Name of the folders of images, for masks."""
    masks: str = "masks"
    """Name of the folders of masks, for masks."""
    min_area: int = FragmentRule.min_area
    """Pixels: smaller instances are dropped, and of larger ones smaller parts that lie apart."""
    max_loss: float = FragmentRule.max_loss
    """Most of an instance's pixels that may be dropped with such parts, as a share."""
    apart: Literal["stop", "keep", "split"] = "stop"
    """What is done where numbers mostly stand for parts that lie apart, as in masks of classes. stop; keep: a number is
    one instance all the same; split: every connected part of a number is an instance, in all masks."""
    preview: str | None = None
    """PNG to draw of a dozen images with what was made of their masks: look at it before training."""

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise InputError(f"dataset is {self.dataset!r}: {nearest(self.dataset.lower(), DATASETS)}")
        FragmentRule(self.min_area, self.max_loss)
        if self.preview is not None and Path(self.preview).suffix.lower() != ".png":
            raise InputError(f"preview is {self.preview!r}: give the name of a .png file")
        for name in ("images", "masks"):
            if not getattr(self, name) or "/" in getattr(self, name):
                raise InputError(f"{name} is {getattr(self, name)!r}: give a folder's name, without /")
