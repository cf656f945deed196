"""COCO average precision of boxes and masks, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ca2cl.common.optional import need
from ca2cl.detection.coco.segmentations import REMEDY, Json
from ca2cl.errors import InputError

# where COCOeval keeps what it would print
_STATS = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5}
_KINDS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}


def coco_scores(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Average precision of ``results`` on the images of ``truth``.

    Args:
        truth: content of a COCO file, as ``read_coco`` gives it.
        results: one a prediction: ``image_id``, ``category_id``, ``score``, ``bbox`` [x, y, width, height] and, where
            masks are predicted, ``segmentation``. At most the 100 best of an image count.

    Returns:
        ``box/AP`` (mean over IoU .50 to .95), ``box/AP50``, ``box/AP75``, and ``box/AP_small``, ``_medium``, ``_large``
        (areas below 32 x 32 pixels, below 96 x 96, and the rest); the same under ``mask/`` unless
        results are boxes alone. From 0 to 1; a size that no annotation has is left out.

    Raises:
        InputError: nothing is annotated, or a result is of an unknown image or category, or lacks a field.
    """
    if not truth["annotations"]:
        raise InputError("the COCO file has no annotation, so there is nothing to score; give another split")
    _check(truth, results)
    truth, results = _numbered(truth, results)
    masks = all("segmentation" in row for row in results)
    if masks and not all(row.get("segmentation") for row in truth["annotations"]):
        if results:
            raise InputError("the COCO file has annotations without segmentation; score boxes alone")
        masks = False
    scores: dict[str, float] = {}
    for kind, (iou_type, keep) in _KINDS.items():
        if kind == "mask" and not masks:
            continue
        # With its box a mask's size would be taken from that: COCO sorts by area, and the box's is another.
        fields = ("image_id", "category_id", "score", keep)
        stats = _stats(truth, [{name: row[name] for name in fields} for row in results], iou_type)
        scores.update({f"{kind}/{name}": float(stats[place]) for name, place in _STATS.items() if stats[place] >= 0})
    return scores


def _numbered(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> tuple[Json, list[Json]]:
    """Both as copies with ids 1, 2, ..., of images and categories in the order of their own.

    COCOeval takes the id 0 of an annotation for "not matched" and one that is there twice for one object, keeps ids as
    floats, and finds nothing where some ids are text.
    """
    images, categories = (
        {one: place for place, one in enumerate(sorted((row["id"] for row in truth[part]), key=_by_kind), start=1)}
        for part in ("images", "categories")
    )

    def of(row: Mapping[str, Any]) -> Json:
        return {**row, "image_id": images[row["image_id"]], "category_id": categories[row["category_id"]]}

    rows = [{"iscrowd": 0, **of(row), "id": place} for place, row in enumerate(truth["annotations"], start=1)]
    numbered = {
        "info": {},
        "images": [{**row, "id": images[row["id"]]} for row in truth["images"]],
        "categories": [{**row, "id": categories[row["id"]]} for row in truth["categories"]],
        "annotations": rows,
    }
    return numbered, [of(row) for row in results]


def _by_kind(value: Any) -> tuple[bool, Any]:
    return isinstance(value, str), value


def _stats(truth: Mapping[str, Any], rows: list[Json], iou_type: str) -> Sequence[float]:
    """COCOeval's twelve numbers; -1 where no annotation stands behind one."""
    COCO = need("pycocotools.coco", REMEDY).COCO
    COCOeval = need("pycocotools.cocoeval", REMEDY).COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # every step of it prints
        annotated, predicted = COCO(), COCO()
        annotated.dataset = {**truth, "annotations": [dict(row) for row in truth["annotations"]]}  # it marks rows
        annotated.createIndex()
        if rows:
            predicted = annotated.loadRes(rows)
        else:  # loadRes looks at the first row, and there is none
            predicted.dataset = {**truth, "annotations": []}
            predicted.createIndex()
        evaluation = COCOeval(annotated, predicted, iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    stats: Sequence[float] = evaluation.stats
    return stats


def _check(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    images = {image["id"] for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    for place, row in enumerate(results):
        lacking = next((name for name in ("image_id", "category_id", "score", "bbox") if name not in row), None)
        if lacking:
            raise InputError(f"result {place}: lacks {lacking}; give image_id, category_id, score and bbox")
        if row["image_id"] not in images:
            raise InputError(
                f"result {place}: image_id {row['image_id']} is not in the COCO file; give its own results"
            )
        if row["category_id"] not in categories:
            raise InputError(f"result {place}: category_id {row['category_id']}; the file has {sorted(categories)}")
        if not math.isfinite(row["score"]):
            raise InputError(f"result {place}: score is {row['score']}; give a finite number")
    bare = next((place for place, row in enumerate(results) if "segmentation" not in row), None)
    if bare is not None and any("segmentation" in row for row in results):
        raise InputError(f"result {bare}: lacks segmentation, which others have; give it to all or to none")
