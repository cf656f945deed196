"""What must hold of a COCO file's rows before pycocotools sees them.

Its C code believes what it is given: run lengths that reach beyond their image are written beyond their buffer, a
polygon's edge is drawn pixel by pixel however long it is, and a declared size is allocated.
Legend: N characters, M runs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.data.decode import MAX_PIXELS
from ca2cl.untrusted import is_file_name, is_number, is_text, is_whole

_LONGEST_OUTLINE = 1e6  # pixels of one polygon's outline
_LONGEST_RUN = 7  # characters of one run length: 35 bits


def fault_of(part: str, row: dict[str, Any]) -> str:
    """What is wrong with a row of ``images``, ``annotations`` or ``categories``, in words, or nothing. Segmentations
    are not looked at."""
    for name in ("id", "image_id", "category_id"):
        if name in row and not (is_whole(row[name]) or is_text(row[name])):
            return f"{name} {row[name]!r} is neither a number nor text"
    if part == "images":
        return _fault_of_image(row)
    if part == "categories":
        return "" if is_text(row["name"]) else f"name {row['name']!r} is no text"
    return _fault_of_annotation(row)


def _fault_of_image(row: dict[str, Any]) -> str:
    height, width = row["height"], row["width"]
    if not (is_whole(height, 1) and is_whole(width, 1) and height * width <= MAX_PIXELS):
        return f"height {height!r} and width {width!r} are no size of an image"
    if not is_file_name(row["file_name"]):
        return f"file_name {row['file_name']!r} is no path in the images' folder"
    return ""


def _fault_of_annotation(row: dict[str, Any]) -> str:
    box = row["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(is_number(edge) and abs(edge) < 1e9 for edge in box)):
        return f"bbox {box!r} is no list of four numbers"
    if not is_number(row["area"]):
        return f"area {row['area']!r} is no number"
    for name in ("iscrowd", "instance_id"):
        if name in row and not is_whole(row[name], 0, 2**31):
            return f"{name} {row[name]!r} is no whole number"
    return ""


def fault_of_segmentation(segmentation: Any, height: int, width: int) -> str:
    """What is wrong with run lengths or polygons for an image of this size, in words, or nothing."""
    if isinstance(segmentation, list):
        return next((told for told in (_fault_of_polygon(one, height, width) for one in segmentation) if told), "")
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "neither run lengths nor polygons"
    if segmentation["size"] != [height, width]:
        return f"{segmentation['size']!r} pixels, its image has {[height, width]}"
    counts = segmentation["counts"]
    if isinstance(counts, list):
        whole = all(is_whole(run, 0, MAX_PIXELS) for run in counts)
    else:
        decoded = _decoded(counts) if isinstance(counts, str) else None
        whole = decoded is not None and bool(((decoded >= 0) & (decoded <= MAX_PIXELS)).all())
        counts = decoded.tolist() if decoded is not None else []
    return "" if whole and sum(counts) == height * width else "run lengths that do not fill the image"


def _decoded(text: str) -> npt.NDArray[np.int64] | None:
    """Lengths (M,) of compressed runs, as COCO writes them: five bits a character, the sixth says that more follow;
    from the fourth run on the difference to the one two before."""
    if not text.isascii():
        return None
    bits_N = np.frombuffer(text.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(bits_N & 32 == 0)
    if not len(ends) or bits_N.min() < 0 or bits_N.max() > 63 or ends[-1] != len(bits_N) - 1:
        return None
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > _LONGEST_RUN:
        return None
    place_N = np.arange(len(bits_N)) - np.repeat(starts, lengths)
    runs_M = np.add.reduceat((bits_N & 31) << (5 * place_N), starts)
    runs_M -= np.where(bits_N[ends] & 16, 1 << (5 * lengths), 0)
    for first in (1, 2):
        runs_M[first::2] = np.cumsum(runs_M[first::2])
    return runs_M


def _fault_of_polygon(points: Any, height: int, width: int) -> str:
    if not isinstance(points, list) or len(points) < 6 or len(points) % 2:
        return "a polygon that is no list of three or more points"
    reach = height + width
    if not all(is_number(value) and -reach <= value <= 2 * reach for value in points):
        return "a polygon with points far outside the image"
    xy = np.array(points, float).reshape(-1, 2)
    outline = np.abs(xy - np.roll(xy, 1, axis=0)).max(axis=1).sum()
    return "" if outline <= _LONGEST_OUTLINE else "a polygon with an endless outline"
