"""Splits of a detection job as data sets in MLflow."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ca2cl.common.files import file_digest
from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.store.inputs import describe_input


def describe_splits(splits: Mapping[str, CocoSplit]) -> list[dict[str, Any]]:
    """The splits for ``log_inputs``: images, and annotated objects by category."""
    found = []
    for name, split in splits.items():
        coco = read_coco(split.annotations)
        names = {one["id"]: one["name"] for one in coco["categories"]}
        counts = Counter(names[one["category_id"]] for one in coco["annotations"])
        manifest = {
            "name": f"{split.images.parent.name}/{name}",
            "digest": file_digest(split.annotations),
            "samples": len(coco["images"]),
            "classes": list(names.values()),
            "counts": dict(counts),
            "source": str(split.images),
        }
        found.append(describe_input(str(split.annotations), manifest, "training" if name == "train" else "testing"))
    return found
