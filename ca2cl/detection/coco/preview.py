"""Contact sheet of images with their annotated outlines and boxes."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.data.decode import Pixels, decode
from ca2cl.detection.coco.files import decode_mask
from ca2cl.detection.coco.instances import Region
from ca2cl.detection.coco.segmentations import Json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = 12
_COLUMNS = 4
_INCHES = 3.6
# distinct on pink and purple tissue, and to those who cannot distinguish red and green
COLOURS = ("#00e5ff", "#ffe600", "#39ff14", "#ffffff", "#1040ff", "#ff9100")


def draw_preview(root: Path, splits: Mapping[str, Json]) -> bytes:
    """The sheet of a folder that ``ca2cl detect prepare`` wrote, as PNG.

    Images and annotations are read back from the written files, so that a fault in them shows.

    Args:
        splits: content of the COCO files by split; images are taken from all of them, spread evenly over each.
    """
    from matplotlib.figure import Figure

    chosen = shown_images(splits)
    rows = -(-len(chosen) // _COLUMNS)
    figure = Figure(figsize=(_COLUMNS * _INCHES, rows * _INCHES * 0.85), layout="constrained")
    for place, (split, image) in enumerate(chosen, start=1):
        own = [row for row in splits[split]["annotations"] if row["image_id"] == image["id"]]
        facts = [f"patient {image['patient_id']}"] if "patient_id" in image else []
        facts += [image["grade"]] if "grade" in image else []
        title = ", ".join([f"{split}/{image['file_name']}", *facts, f"{len(own)} instances"])
        pixels_HWC = decode((root / split / image["file_name"]).read_bytes())
        draw_instances(figure.add_subplot(rows, _COLUMNS, place), pixels_HWC, image, own, title)
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


def draw_instances(axes: Axes, pixels_HWC: Pixels, image: Json, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """An image with the outline, where there is a mask, and the box of each annotation or result.

    Args:
        axes: to draw on.
        pixels_HWC: the image, uint8 RGB.
        image: its entry of the COCO file.
        rows: annotations or results.
        title: above it.
    """
    from matplotlib.patches import Rectangle

    axes.imshow(pixels_HWC)
    for number, row in enumerate(rows):
        colour = COLOURS[number % len(COLOURS)]
        left, top, width, height = row["bbox"]
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=colour, linewidth=0.5))
        if "segmentation" in row:
            _outline(axes, decode_mask(row["segmentation"], image["height"], image["width"]), colour)
    axes.set_title(title, fontsize=7, parse_math=False)  # a $ in a file's name is no formula
    axes.set_axis_off()


def _outline(axes: Axes, mask_HW: Region, colour: str) -> None:
    for box in ndimage.find_objects(mask_HW.astype(np.uint8)):  # none of a detector's empty mask
        # one pixel of background around it, or an outline at the image's border would not close
        window = np.pad(mask_HW[box], 1).astype(float)
        down, across = (np.arange(side.start - 1, side.stop + 1) for side in box)
        axes.contour(across, down, window, levels=[0.5], colors=[colour], linewidths=1.2)
