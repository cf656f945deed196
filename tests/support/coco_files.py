"""A COCO file of two classes, a detector that finds exactly what is in it, and what that scores."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from ca2cl.detection.coco.files import encode_mask
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.engines.predictions import Detections
from ca2cl.detection.scores.scoring import score_split

Json = dict[str, Any]
CLASSES = ("gland", "nerve")
PLACES = ((8, 8), (36, 36), (8, 40))
"""Upper left corners of the objects of an image, 18 x 14 pixels each."""


def coco(images: int = 3) -> Json:
    """Of as many images, three objects each, the classes in turn."""
    rows: list[Json] = []
    for image in range(1, images + 1):
        for y, x in PLACES:
            mask_HW = np.zeros((64, 64), bool)
            mask_HW[y : y + 18, x : x + 14] = True
            rows.append(
                {
                    "id": len(rows) + 1, "image_id": image, "category_id": 1 + len(rows) % 2,
                    "segmentation": encode_mask(mask_HW), "area": 252, "bbox": [x, y, 14, 18], "iscrowd": 0,
                }
            )  # fmt: skip
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 64, "width": 64} for i in range(1, images + 1)],
        "annotations": rows,
        "categories": [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)],
    }


def write_split(root: Path, split: str, data: Json, **options: Any) -> CocoSplit:
    """A split of a folder as ``ca2cl detect`` takes it: the file, and its images as they are named here."""
    (root / split).mkdir(parents=True, exist_ok=True)
    for number in range(1, 4):
        Image.new("RGB", (64, 64), (200, 120, 150)).save(root / split / f"{number}.png", **options)
    (root / f"{split}.json").write_text(json.dumps(data))
    return CocoSplit.of(root, split)


class Perfect:
    """Finds what ``coco`` has, labels counted as in ``CLASSES``; ``rows`` says which of the annotations."""

    classes = CLASSES

    def __init__(self, rows: Sequence[int] = range(9)) -> None:
        self.rows = rows

    def predict(self, images: Iterable[Any]) -> Iterator[Detections]:
        truth = coco()["annotations"]
        for image, _ in enumerate(images, start=1):
            own = [truth[row] for row in self.rows if truth[row]["image_id"] == image]
            boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (row["bbox"] for row in own)], np.float32)
            yield Detections(
                boxes.reshape(-1, 4),
                np.linspace(0.99, 0.9, len(own)).astype(np.float32),
                np.array([row["category_id"] - 1 for row in own], np.int64),
                [row["segmentation"] for row in own],
            )


def perfect_scores(root: Path, data: Json, rows: Sequence[int] = range(9)) -> dict[str, float]:
    """What the perfect detector scores on the file."""
    alone = SimpleNamespace(process_index=0, num_processes=1, is_main_process=True)
    detector: Any = Perfect(rows)
    scored = score_split(detector, write_split(root, "valid", data), "valid", min_score=0.5, accelerator=alone)
    assert scored is not None
    return scored.scores
