"""Settings of ``ca2cl detect predict``."""

from __future__ import annotations

from dataclasses import dataclass, field

from annotated_types import Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.config import TrackingConfig

POSITIONAL = ("detector", "images", "out")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Detect glands in a folder of images.

    OUT gets predictions.json (COCO, with a score for every annotation), masks/NAME.png (16 bits: 0 is background; 1, 2,
    ... are detections from the best down) and overlays/NAME.png. It appears when it is complete.
    """

    detector: str
    """Run id (or its first digits) or folder, of one training (cells/NAME/detector) or of a job. For a job, the first
    training of its encoder is used."""
    images: str
    """Folder of images; subfolders are ignored."""
    out: str
    """New or empty folder to write."""
    truth: str | None = None
    """COCO file of the same images, as written by `ca2cl detect prepare`; if given, the predictions are scored."""
    min_score: float = 0.5
    """Minimum score of a detection to be in masks and overlays, and to count for F1, Dice and Hausdorff.
    predictions.json has all detections."""
    overlays: bool = True
    """Draw the overlays."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store of the run."""

    def __post_init__(self) -> None:
        check_ranges(self, min_score=Interval(gt=0, lt=1))
