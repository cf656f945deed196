"""Validate COCO files and normalise the differences between exporters.

One reader for training, scoring, predicting and pictures (``coco.read_coco``), so that a file means the same to all:

- an id is a number or text, and one of a kind among images and among categories; ids of annotations may be anything,
  for nothing is looked up by them;
- images have different files, categories different names, annotations a listed image and a listed category;
- where there is a segmentation, box and area are its own, and a ``bbox`` that differs is reported; where there is none,
  the object is its box; an object without a pixel and an exact copy of another are left out and reported; rows with a
  ``score``, what a detector found, stay as they are;
- ``info``, ``licenses``, ``iscrowd`` and ``area`` may be missing, whole numbers may be written as 3.0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, TypeVar

from ca2cl.common.records import is_file_name, is_number, is_text, is_whole
from ca2cl.data.decode import MAX_PIXELS
from ca2cl.detection.coco.segmentations import Json, fault_of_segmentation, mask_tools, shape_of
from ca2cl.errors import InputError

Row = TypeVar("Row")
_PARTS = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("image_id", "category_id"),
}
"""The lists of a file, and what each row must have."""
_SHOWN = 300  # characters of a fault that are shown
_NEAR = 3.0  # pixels: edges that differ by less are one box, rounded in two ways
_EXPORT = "correct the file, or export it again"


class _Fault(Exception):
    """The fault of a row, and its remedy."""

    def __init__(self, fault: str, remedy: str = _EXPORT) -> None:
        super().__init__(f"{fault[:_SHOWN]}; {remedy}")


Notes = dict[str, list[str]]
"""Annotations that were changed or left out, by kind of change."""


def check_coco(data: Any, where: object, notes: Notes) -> Json:
    """The content of a COCO file as its readers need it.

    Args:
        data: what the file holds.
        where: its name, for errors.
        notes: gets what was not taken as it stands.

    Returns:
        The same with ids, sizes and ``iscrowd`` as numbers, and of every annotation ``bbox``, ``area``, ``iscrowd``
        and, where it has one, ``segmentation``: compressed run lengths or polygons that fit its image.

    Raises:
        InputError: a row that cannot be read, or that could be read in two ways.
    """
    images = _by_id(data, "images", "image", "file_name", where, _image)
    categories = _by_id(data, "categories", "category", "name", where, _category)
    reader = _Annotations(images, categories, notes)
    annotations = [row for row in _rows(data, "annotations", "annotation", where, reader.read) if row is not None]
    if 0 < reader.reach <= 1:  # they are valid boxes, and only so small ones are a sign of shares
        raise InputError(
            f"{where}: all annotations lie in the first pixel of their image; multiply shares of the image by its "
            "width and height"
        )
    if 4 * reader.beyond > reader.boxes:
        raise InputError(
            f"{where}: {reader.beyond} of {reader.boxes} boxes reach beyond their images, as corners would that are "
            "taken for width and height; give bbox as [x, y, width, height]"
        )
    return {
        **data,
        "images": list(images.values()),
        "categories": list(categories.values()),
        "annotations": annotations,
    }


def _rows(data: Any, part: str, kind: str, where: object, read: Callable[[Json], Row]) -> list[Row]:
    """The rows of a list of the file, read one by one.

    Args:
        data: content of the file.
        part: name of the list.
        kind: what a row is, for errors.
        where: name of the file, for errors.
        read: gives the row, or raises ``_Fault``.
    """
    rows = data.get(part) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{where}: has no list of {part}, so it is no COCO file of instances; {_EXPORT}")
    found = []
    for number, row in enumerate(rows, start=1):
        lacking = next((name for name in _PARTS[part] if name not in row), None)
        if lacking:
            raise InputError(f"{where}: number {number} of the {part} lacks {lacking}; {_EXPORT}")
        try:
            found.append(read(row))
        except _Fault as fault:
            named = _quoted(row["id"]) if "id" in row else f"number {number}"
            raise InputError(f"{where}: {kind} {named} {fault}") from None
    return found


def _quoted(value: Any) -> str:
    return repr(value)[:80]


def _number(value: Any) -> Any:
    """A float that is a whole number as one; everything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _id(row: Json, name: str) -> Any:
    value = _number(row[name])
    if not (is_whole(value) or is_text(value)):
        raise _Fault(f"has {name} {_quoted(value)}, neither a number nor text")
    return value


def _image(row: Json) -> Json:
    height, width = _number(row["height"]), _number(row["width"])
    if not (is_whole(height, 1) and is_whole(width, 1) and height * width <= MAX_PIXELS):
        raise _Fault(f"has height {_quoted(height)} and width {_quoted(width)}, no size of an image", "give its pixels")
    name = row["file_name"]
    if not is_file_name(name) or not is_file_name(name.replace("\\", "/")):
        raise _Fault(f"has file_name {_quoted(name)}, which is no path in the images' folder", "give one in it")
    return {**row, "id": _id(row, "id"), "height": height, "width": width}


def _category(row: Json) -> Json:
    if not is_text(row["name"]):
        raise _Fault(f"has name {_quoted(row['name'])}, which is no text")
    return {**row, "id": _id(row, "id")}


def _by_id(data: Any, part: str, kind: str, name: str, where: object, read: Callable[[Json], Json]) -> dict[Any, Json]:
    """The rows of a list by id, of which no two have one id or one ``name``; the other arguments as in ``_rows``."""
    found: dict[Any, Json] = {}
    ids: dict[str, Any] = {}
    for row in _rows(data, part, kind, where, read):
        number = row["id"]
        if number in found:
            raise InputError(f"{where}: id {_quoted(number)} belongs to more than one {kind}; give each its own")
        value = str(PurePosixPath(row[name].replace("\\", "/"))) if name == "file_name" else row[name]
        if value in ids:
            raise InputError(
                f"{where}: {kind} {_quoted(number)} has {name} {_quoted(value)}, as {_quoted(ids[value])} has; "
                "join the two, or rename one"
            )
        found[number], ids[value] = row, number
    return found


class _Annotations:
    """Reads annotations one after another."""

    def __init__(self, images: Mapping[Any, Json], categories: Mapping[Any, Json], notes: Notes) -> None:
        self.images, self.categories, self.notes = images, categories, notes
        self.reach = 0.0
        """How far to the right or down the farthest object reaches, in pixels."""
        self.boxes = self.beyond = 0
        """Objects that are boxes alone, and those of them that reach beyond their image."""
        self._seen: dict[tuple[Any, ...], Any] = {}

    def read(self, row: Json) -> Json | None:
        """The annotation; None of one that is left out."""
        image_id, category_id = _id(row, "image_id"), _id(row, "category_id")
        if image_id not in self.images:
            raise _Fault(f"is of image {_quoted(image_id)}, which is not listed", "list it, or take the annotation out")
        if category_id not in self.categories:
            known = ", ".join(map(_quoted, list(self.categories)[:12]))
            raise _Fault(f"has category_id {_quoted(category_id)}, the categories are {known}", "correct it")
        image = self.images[image_id]
        named = f"{_quoted(row.get('id'))} of {_quoted(image['file_name'])}"
        given, crowd = _box(row.get("bbox")), _crowd(row.get("iscrowd"))
        made = {**row, "image_id": image_id, "category_id": category_id, "iscrowd": crowd}
        made |= self._shape(made.pop("segmentation", None), given, image)
        x, y, width, height = made["bbox"]
        self.reach = max(self.reach, x + width, y + height)
        if given is not None and "score" in row:
            return {**made, "bbox": given}
        if not made["area"] > 0 or min(width, height) <= 0:
            self._note("have no pixel and are left out", named)
            return None
        if given is not None and not crowd:
            if _same(given, made["bbox"]):
                made["bbox"] = given
            else:
                self._note("have a bbox that is not their segmentation's, which is taken instead", named)
        if not crowd and _overlap(made["bbox"], [0, 0, image["width"], image["height"]], 1) < 0.5:
            size = f"{image['width']} x {image['height']}"
            fault = f"lies outside of its image, bbox {made['bbox']} of {size} pixels"
            raise _Fault(fault, "give bbox as [x, y, width, height] of the image as it is stored")
        return self._first(made, named)

    def _shape(self, segmentation: Any, given: list[float] | None, image: Json) -> Json:
        """Segmentation, box and area."""
        if segmentation in (None, []):
            if given is None:
                raise _Fault("has neither segmentation nor bbox")
            self.boxes += 1
            self.beyond += given[0] + given[2] > image["width"] + _NEAR or given[1] + given[3] > image["height"] + _NEAR
            return {"bbox": given, "area": given[2] * given[3]}
        fault = fault_of_segmentation(segmentation, image["height"], image["width"])
        if fault:
            raise _Fault(f"has a segmentation that cannot be: {fault}")
        return shape_of(segmentation, image["height"], image["width"])

    def _note(self, kind: str, named: str) -> None:
        self.notes.setdefault(kind, []).append(named)

    def _first(self, row: Json, named: str) -> Json | None:
        key = (row["image_id"], row["category_id"], row["iscrowd"], *row["bbox"])
        shape = row.get("segmentation")
        if key in self._seen and self._seen[key] == shape:
            self._note("are exact copies of others and are left out", named)
            return None
        self._seen.setdefault(key, shape)
        return row


def _box(value: Any) -> list[float] | None:
    if value is None:
        return None
    if not (isinstance(value, list) and len(value) == 4 and all(is_number(edge) and abs(edge) < 1e9 for edge in value)):
        raise _Fault(f"has bbox {_quoted(value)}, which is no list of four numbers", "give [x, y, width, height]")
    if min(value[2:]) < 0:
        raise _Fault(f"has bbox {_quoted(value)}, with a side below zero", "give [x, y, width, height]")
    return value


def _crowd(value: Any) -> int:
    number = int(value or 0) if isinstance(value, bool) or value is None else _number(value)
    if not is_whole(number, 0, 1):
        raise _Fault(f"has iscrowd {_quoted(value)}, neither 0 nor 1")
    return int(number)


def _same(one: list[float], other: list[float]) -> bool:
    """True where half of the union of two boxes is in both, or every edge is near."""
    (left, top, width, height), (x, y, w, h) = one, other
    edges = (left - x, top - y, left + width - x - w, top + height - y - h)
    return _overlap(one, other, 0) >= 0.5 or (min(width, height) > 0 and max(map(abs, edges)) <= _NEAR)


def _overlap(one: list[float], other: list[float], crowd: int) -> float:
    """Area that two boxes share, as a share of their union; of ``one`` alone where ``crowd`` is 1."""
    return float(mask_tools().iou([one], [other], [crowd])[0, 0])
