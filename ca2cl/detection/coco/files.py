"""Read and write COCO files of instances, with run-length masks.

Run lengths rather than polygons, because they hold the mask's pixels exactly: holes stay holes, parts stay parts, and
reading gives back what was written. A polygon runs along pixel centres and can hold neither hole nor exact edge. Such
annotations (``iscrowd`` 0) are what torchvision's and detectron2's data loaders (``INPUT.MASK_FORMAT: bitmask``) and
COCO's own evaluation take. Legend: H, W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.records import is_whole, parse_json
from ca2cl.detection.coco.instances import Ids, Instance, Region
from ca2cl.detection.coco.segmentations import Json, compressed, fault_of_segmentation, mask_tools
from ca2cl.detection.coco.validation import Notes, check_coco
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)
CATEGORIES = ({"id": 1, "name": "gland", "supercategory": "gland"},)
_AGAIN = "write the folder again with `ca2cl detect prepare`"


def encode_mask(mask_HW: Region) -> Json:
    """A mask (H, W) as COCO's compressed run lengths: ``size`` [H, W] and ``counts``, text."""
    code = mask_tools().encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def decode_mask(segmentation: Any, height: int, width: int) -> Region:
    """The mask (H, W) of run lengths, compressed or not, or of a list of polygons.

    Raises:
        InputError: of another size, or nothing of these.
    """
    fault = fault_of_segmentation(segmentation, height, width) if segmentation else "there is none"
    if fault:
        raise InputError(f"segmentation: {fault}; {_AGAIN}")
    mask_HW: Region = mask_tools().decode(compressed(segmentation, height, width)).astype(bool)
    return mask_HW


def annotation(number: int, image_id: int, instance: Instance, size: tuple[int, int]) -> Json:
    """One instance as COCO has it, and its number in the mask as ``instance_id``.

    Args:
        number: of the annotation, from 1: COCO's evaluation takes 0 for "not matched".
        size: H and W of the image.
    """
    height, width = instance.mask.shape
    full_HW = np.zeros(size, bool)
    full_HW[instance.y : instance.y + height, instance.x : instance.x + width] = instance.mask
    return {
        "id": number,
        "image_id": image_id,
        "category_id": CATEGORIES[0]["id"],
        "segmentation": encode_mask(full_HW),
        "area": instance.area,
        "bbox": [instance.x, instance.y, width, height],
        "iscrowd": 0,
        "instance_id": instance.number,
    }


def read_coco(path: Path, *, warn: bool = False) -> Json:
    """A COCO file's content, checked and completed by ``check_coco``.

    Args:
        warn: log what was changed or left out.

    Raises:
        InputError: missing, not JSON, or not COCO's instances.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8-sig"))  # editors of Windows put a mark in front
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a COCO file, or {_AGAIN}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {_AGAIN}") from None
    notes: Notes = {}
    checked = check_coco(data, path, notes)
    for kind, rows in notes.items() if warn else ():
        logger.warning("%s: %d annotations %s, first %s", path, len(rows), kind, rows[0])
    return checked


def align_categories(data: Json, classes: Sequence[str], where: object) -> Json:
    """``data`` with its categories in the order of ``classes``: files list them in any order, under any ids, and some
    list only those that occur in them. One that is not listed gets an id that is free.

    Raises:
        InputError: annotations of another class.
    """
    known = {category["name"]: category for category in data["categories"]}
    used = {row["category_id"] for row in data["annotations"]}
    annotated = [name for name in known if known[name]["id"] in used]
    if not set(annotated) <= set(classes):
        raise InputError(
            f"{where}: has the classes {', '.join(annotated)}, not {', '.join(classes)}; give splits of one data set, "
            "and a detector of their classes"
        )
    free = 1 + max((one["id"] for one in known.values() if isinstance(one["id"], int)), default=0)
    new = {name: {"id": free + place, "name": name} for place, name in enumerate(classes)}
    return {**data, "categories": [known.get(name, new[name]) for name in classes]}


def instance_ids(image: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]]) -> Ids:
    """The mask (H, W) of one image's annotations, its own ones picked out of ``annotations``, crowds left out.

    Numbers are those of the mask that they come from (``instance_id``), or 1, 2, ... in a file from elsewhere, whose
    ``instance_id`` may mean anything. Where annotations overlap the later one is seen.

    Raises:
        InputError: a segmentation is damaged, or there is none.
    """
    ids_HW = np.zeros((image["height"], image["width"]), np.int64)
    own = [row for row in annotations if row["image_id"] == image["id"] and not row.get("iscrowd")]
    numbers = [row.get("instance_id") for row in own]
    if not all(is_whole(number, 1, 2**31) for number in numbers) or len(set(numbers)) < len(own):
        numbers = list(range(1, len(own) + 1))
    for number, row in zip(numbers, own, strict=True):
        ids_HW[decode_mask(row.get("segmentation"), *ids_HW.shape)] = number
    return ids_HW
