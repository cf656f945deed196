"""COCO files of instances: masks as run lengths, written and read with pycocotools.

Run lengths rather than polygons, because they hold the mask's pixels exactly: holes stay holes, parts stay parts, and
reading gives back what was written. A polygon runs along pixel centres and can hold neither hole nor exact edge. Such
annotations (``iscrowd`` 0) are what torchvision's and detectron2's data loaders (``INPUT.MASK_FORMAT: bitmask``) and
COCO's own evaluation take. Legend: H, W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ca2cl.detection.coco_checks import fault_of, fault_of_segmentation
from ca2cl.detection.instances import Ids, Instance, Region
from ca2cl.errors import InputError
from ca2cl.optional import need
from ca2cl.untrusted import parse_json

Json = dict[str, Any]
REMEDY = 'pip install "ca2cl[detection]"'
CATEGORIES = ({"id": 1, "name": "gland", "supercategory": "gland"},)
_TOLD = 300  # characters of a fault that are shown
_AGAIN = "write the folder again with `ca2cl detect prepare`"


def mask_tools() -> ModuleType:
    """pycocotools' masks.

    Raises:
        MissingPackage: it is not installed.
    """
    return need("pycocotools.mask", REMEDY)


def encode_mask(mask_HW: Region) -> Json:
    """A mask (H, W) as COCO's compressed run lengths: ``size`` [H, W] and ``counts``, text."""
    code = mask_tools().encode(np.asfortranarray(mask_HW, dtype=np.uint8))
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}


def decode_mask(segmentation: Any, height: int, width: int) -> Region:
    """The mask (H, W) of run lengths, compressed or not, or of a list of polygons.

    Raises:
        InputError: of another size, or nothing of these.
    """
    tools = mask_tools()
    fault = fault_of_segmentation(segmentation, height, width) if segmentation else "there is none"
    if fault:
        raise InputError(f"segmentation: {fault}; {_AGAIN}")
    if isinstance(segmentation, list):
        code = tools.merge(tools.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = tools.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    mask_HW: Region = tools.decode(code).astype(bool)
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


def read_coco(path: Path) -> Json:
    """A COCO file, checked as far as all its readers need it.

    Raises:
        InputError: missing, not JSON, or not COCO's instances.
    """
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a COCO file, or {_AGAIN}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); {_AGAIN}") from None
    needed = {
        "images": ("id", "file_name", "height", "width"),
        "annotations": ("id", "image_id", "category_id", "segmentation", "area", "bbox"),
        "categories": ("id", "name"),
    }
    for part, names in needed.items():
        rows = data.get(part) if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: has no list of {part}, so it is no COCO file of instances; {_AGAIN}")
        lacking = next((name for row in rows for name in names if name not in row), None)
        if lacking:
            raise InputError(f"{path}: one of the {part} lacks {lacking}; {_AGAIN}")
        fault = next((told for told in (fault_of(part, row) for row in rows) if told), "")
        if fault:
            raise InputError(f"{path}: one of the {part}: {fault[:_TOLD]}; {_AGAIN}")
    _check_annotations(path, data)
    return dict(data)


def _check_annotations(path: Path, data: Json) -> None:
    known = {image["id"]: image for image in data["images"]}
    for row in data["annotations"]:
        image = known.get(row["image_id"])
        if image is None:
            raise InputError(f"{path}: annotation {row['id']} is of image {row['image_id']}, not listed; {_AGAIN}")
        fault = fault_of_segmentation(row["segmentation"], image["height"], image["width"])
        if fault:
            raise InputError(f"{path}: segmentation of annotation {row['id']}: {fault[:_TOLD]}; {_AGAIN}")


def instance_ids(image: Mapping[str, Any], annotations: Iterable[Mapping[str, Any]]) -> Ids:
    """The mask (H, W) of one image's annotations, its own ones picked out of ``annotations``.

    Numbers are those of the mask that they come from, or 1, 2, ... in a file from elsewhere. Where annotations overlap
    the later one is seen.

    Raises:
        InputError: a segmentation is damaged.
    """
    ids_HW = np.zeros((image["height"], image["width"]), np.int64)
    own = (row for row in annotations if row["image_id"] == image["id"])
    for place, row in enumerate(own, start=1):
        ids_HW[decode_mask(row["segmentation"], *ids_HW.shape)] = row.get("instance_id", place)
    return ids_HW
