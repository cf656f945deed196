"""Predictions of one image, for COCO's and the GlaS challenge's metrics.

Legend: N detections of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.detection.coco.files import decode_mask
from ca2cl.detection.coco.instances import Ids
from ca2cl.detection.coco.segmentations import Json


@dataclass(frozen=True)
class Detections:
    """Objects that were found in one image, in the image's own pixels."""

    boxes_N4: npt.NDArray[np.float32]
    """Left, top, right and bottom edges: a box of the first pixel alone is 0, 0, 1, 1."""
    scores_N: npt.NDArray[np.float32]
    """From 0 to 1."""
    labels_N: npt.NDArray[np.int64]
    """Classes, counted from 0."""
    masks_N: Sequence[Json] | None = None
    """Run lengths of the whole image, as ``coco.encode_mask`` gives them; None of a detector that has no masks."""

    def __post_init__(self) -> None:
        count = len(self.scores_N)
        assert self.boxes_N4.shape == (count, 4) and self.labels_N.shape == (count,)
        assert self.masks_N is None or len(self.masks_N) == count

    def __len__(self) -> int:
        return len(self.scores_N)


def coco_results(image_id: int, detections: Detections, category_ids: Sequence[int]) -> list[Json]:
    """The detections as COCO's result rows.

    Args:
        category_ids: of the classes, in the order that ``labels_N`` counts in.
    """
    rows: list[Json] = []
    for n, (left, top, right, bottom) in enumerate(detections.boxes_N4.tolist()):
        row: Json = {
            "image_id": image_id,
            "category_id": category_ids[int(detections.labels_N[n])],
            "score": float(detections.scores_N[n]),
            "bbox": [left, top, right - left, bottom - top],
        }
        if detections.masks_N is not None:
            row["segmentation"] = detections.masks_N[n]
        rows.append(row)
    return rows


def label_mask(detections: Detections, height: int, width: int, *, min_score: float = 0.5) -> Ids:
    """One mask (H, W) of the detections that score at least ``min_score``; a pixel is the best-scoring one's.

    Numbers are 1, 2, ... from the best down; one that lies under better ones altogether leaves no pixel.

    Args:
        detections: of one image.
        height: of the image.
        width: likewise.
        min_score: smallest score that counts.
    """
    assert detections.masks_N is not None, "a detector without masks has no label mask"
    ids_HW = np.zeros((height, width), np.int64)
    order = np.argsort(-detections.scores_N, kind="stable")
    kept = [int(n) for n in order if detections.scores_N[n] >= min_score]
    for number in range(len(kept), 0, -1):  # the best last, so that it is on top
        ids_HW[decode_mask(detections.masks_N[kept[number - 1]], height, width)] = number
    return ids_HW
