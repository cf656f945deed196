"""A sheet of images with the outlines and boxes that a COCO file has for them, as PNG."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ca2cl.data.decode import decode
from ca2cl.detection.coco import Json, decode_mask

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12
_COLUMNS = 4
_INCHES = 3.6
# told apart on pink and purple tissue, and by those who do not see red and green apart
_COLOURS = ("#00e5ff", "#ffe600", "#39ff14", "#ffffff", "#1040ff", "#ff9100")


def draw_preview(root: Path, splits: Mapping[str, Json]) -> bytes:
    """The sheet of a folder that ``ca2cl detect prepare`` wrote, as PNG.

    What is drawn is read back from what was written, so that a fault in either shows.

    Args:
        splits: content of the COCO files by split; images are taken from all of them, spread evenly over each.
    """
    from matplotlib.figure import Figure

    chosen = shown_images(splits)
    rows = -(-len(chosen) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _INCHES, rows * _INCHES * 0.85), layout="constrained")
    for place, (split, image) in enumerate(chosen, start=1):
        own = [row for row in splits[split]["annotations"] if row["image_id"] == image["id"]]
        _draw(figure.add_subplot(rows, _COLUMNS, place), root / split, image, own)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100, metadata={"Software": None})  # the same bytes by any release
    return content.getvalue()


def shown_images(splits: Mapping[str, Json]) -> list[tuple[str, Json]]:
    """Up to ``SHOWN`` images, as many of each split as of the others where they have them."""
    sizes = {split: len(data["images"]) for split, data in splits.items()}
    turns = ((turn, split) for turn in range(SHOWN) for split, size in sizes.items() if turn < size)
    shown = Counter(split for _, split in islice(turns, SHOWN))
    chosen: list[tuple[str, Json]] = []
    for split, count in shown.items():
        places = np.linspace(0, sizes[split] - 1, count).round().astype(int)
        chosen += [(split, splits[split]["images"][place]) for place in places]
    return chosen


def _draw(axes: Axes, folder: Path, image: Json, annotations: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(decode((folder / image["file_name"]).read_bytes()))
    for number, row in enumerate(annotations):
        colour = _COLOURS[number % len(_COLOURS)]
        # one pixel of background around it, or an outline at the image's border would not close
        mask_HW = np.pad(decode_mask(row["segmentation"], image["height"], image["width"]), 1)
        x, y, width, height = row["bbox"]
        window = np.s_[y : y + height + 2, x : x + width + 2]
        extent = np.arange(x - 1, x + width + 1), np.arange(y - 1, y + height + 1)
        axes.contour(*extent, mask_HW[window].astype(float), levels=[0.5], colors=[colour], linewidths=1.2)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), width, height, fill=False, edgecolor=colour, linewidth=0.5))
    facts = [f"patient {image['patient_id']}"] if "patient_id" in image else []
    facts += [image["grade"]] if "grade" in image else []
    title = ", ".join([f"{folder.name}/{image['file_name']}", *facts, f"{len(annotations)} instances"])
    axes.set_title(title, fontsize=7, parse_math=False)  # a $ in a file's name is no formula
    axes.set_axis_off()
