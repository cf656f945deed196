"""Segmentations of COCO files: validity, masks, boxes and areas.

pycocotools' C code believes what it is given: run lengths that reach beyond their image are written beyond their
buffer, a polygon's edge is drawn pixel by pixel however long it is, and a declared size is allocated.
Legend: H, W height and width in pixels, N characters, M runs.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.optional import need
from ca2cl.common.records import is_number, is_whole
from ca2cl.data.decode import MAX_PIXELS

Json = dict[str, Any]
REMEDY = 'pip install "ca2cl[detection]"'
_LONGEST_OUTLINE = 1e6  # pixels of one polygon's outline
_LONGEST_RUN = 7  # characters of one run length: 35 bits


def mask_tools() -> ModuleType:
    """pycocotools' masks.

    Raises:
        MissingPackage: it is not installed.
    """
    return need("pycocotools.mask", REMEDY)


def fault_of_segmentation(segmentation: Any, height: int, width: int) -> str:
    """The fault of run lengths or polygons for an image of this size, in words; empty where there is none."""
    if isinstance(segmentation, list):
        return next(filter(None, (_fault_of_polygon(one, height, width) for one in segmentation)), "")
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "neither run lengths nor polygons"
    if segmentation["size"] != [height, width]:
        return f"{segmentation['size']!r} pixels, its image has {[height, width]}"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        counts = _decoded(counts)
    whole = isinstance(counts, list) and all(is_whole(run, 0, MAX_PIXELS) for run in counts)
    return "" if whole and sum(counts) == height * width else "run lengths that do not fill the image"


def _decoded(text: str) -> list[int]:
    """Lengths of compressed runs, as COCO writes them: five bits a character, the sixth says that more follow; from the
    fourth run on the difference to the one two before. None of a text that is damaged."""
    if not text.isascii():
        return []
    bits_N = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits_N & 32 == 0)
    if not len(ends) or bits_N.min() < 0 or bits_N.max() > 63 or ends[-1] != len(bits_N) - 1:
        return []
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_RUN:
        return []
    place_N = np.arange(len(bits_N)) - np.repeat(starts, lengths)
    runs_M = np.add.reduceat((bits_N & 31) << (5 * place_N), starts)
    runs_M -= np.where(bits_N[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs_M[first::2] = np.cumsum(runs_M[first::2])
    return list(runs_M.tolist())


def _fault_of_polygon(points: Any, height: int, width: int) -> str:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return "a polygon that is no list [x, y, x, y, ...] of three or more points"
    reach = height + width
    if not all(is_number(value) and -reach <= value <= 2 * reach for value in points):
        return "a polygon with points far outside the image"
    xy = np.array(points, float).reshape(-1, 2)
    outline = np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum()
    return "" if outline <= _LONGEST_OUTLINE else "a polygon with an endless outline"


def compressed(segmentation: Any, height: int, width: int) -> Json:
    """pycocotools' run lengths of a segmentation that has no fault."""
    tools = mask_tools()
    if isinstance(segmentation, list):
        return dict(tools.merge(tools.frPyObjects(segmentation, height, width)))
    if isinstance(segmentation["counts"], list):
        return dict(tools.frPyObjects(segmentation, height, width))
    return dict(segmentation)


def shape_of(segmentation: Any, height: int, width: int) -> Json:
    """``segmentation`` (run lengths compressed), ``bbox`` and ``area`` of one that has no fault; the area of polygons
    is that between their corners, as in COCO's own files."""
    tools = mask_tools()
    if isinstance(segmentation, list):
        polygons = [np.array(points, float).reshape(-1, 2) for points in segmentation]
        low = np.min([xy.min(axis=0) for xy in polygons], axis=0)
        high = np.max([xy.max(axis=0) for xy in polygons], axis=0)
        area = sum(_polygon_area(xy) for xy in polygons)
        if (high - low).min() < 2 and not tools.area(compressed(segmentation, height, width)):
            area = 0.0  # it runs between the centres of pixels
        return {"segmentation": segmentation, "bbox": [*low.tolist(), *(high - low).tolist()], "area": area}
    code = compressed(segmentation, height, width)
    if isinstance(code["counts"], bytes):
        code = {"size": [height, width], "counts": code["counts"].decode("ascii")}
    return {"segmentation": code, "bbox": tools.toBbox(code).tolist(), "area": int(tools.area(code))}


def _polygon_area(xy: npt.NDArray[np.float64]) -> float:
    x, y = xy.T
    return abs(float(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))) / 2
