"""Plot detections beside annotations, and overlay them on an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ImageColor
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.data.decode import Pixels
from ca2cl.detection.coco.files import decode_mask, read_coco
from ca2cl.detection.coco.preview import COLOURS, draw_instances
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.engines.predictions import Detections

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 4
_INCHES = 4.0
_EDGE = 2  # pixels


def draw_samples(split: CocoSplit, title: str, results: Sequence[Mapping[str, Any]], min_score: float) -> Figure:
    """Images spread evenly over the split, annotations on the left and detections of at least ``min_score`` on the
    right.

    Args:
        split: its images and annotations.
        title: of the figure.
        results: COCO rows.
        min_score: smallest score that is drawn.
    """
    from matplotlib.figure import Figure

    truth = read_coco(split.annotations)
    places = np.unique(np.linspace(0, len(truth["images"]) - 1, SHOWN).round().astype(int))
    images = [truth["images"][place] for place in places]
    found: dict[int, list[Json]] = defaultdict(list)
    for row in results:
        if row["score"] >= min_score:
            found[row["image_id"]].append(dict(row))
    figure = Figure(figsize=(2 * _INCHES, len(images) * _INCHES * 0.75), layout="constrained")
    for image, pair in zip(images, figure.subplots(len(images), 2, squeeze=False), strict=True):
        pixels_HWC = split.read(image)
        own = [row for row in truth["annotations"] if row["image_id"] == image["id"]]
        sides = (("annotated", own), (f"found, score {min_score} or more", found[image["id"]]))
        for axes, (word, rows) in zip(pair, sides, strict=True):
            draw_instances(axes, pixels_HWC, image, rows, f"{title}/{image['file_name']}: {len(rows)} {word}")
    return figure


def draw_overlay(pixels_HWC: Pixels, found: Detections, min_score: float) -> Pixels:
    """The image with the outlines of what scores at least ``min_score``, or its boxes from a detector without masks."""
    height, width = pixels_HWC.shape[:2]
    drawn_HWC: Pixels = pixels_HWC.copy()
    kept = [int(n) for n in np.argsort(found.scores_N, kind="stable") if found.scores_N[n] >= min_score]
    for place, n in enumerate(kept):  # the best last, so that it is on top
        if found.masks_N is not None:
            inside_HW = decode_mask(found.masks_N[n], height, width)
        else:
            left, top, right, bottom = found.boxes_N4[n].round().astype(int).tolist()
            inside_HW = np.zeros((height, width), bool)
            inside_HW[max(top, 0) : bottom, max(left, 0) : right] = True
        edge_HW = inside_HW & ~ndimage.binary_erosion(inside_HW, iterations=_EDGE)
        drawn_HWC[edge_HW] = ImageColor.getrgb(COLOURS[place % len(COLOURS)])
    return drawn_HWC
