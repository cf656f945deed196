"""Draw the slides of a job, from what their scans left."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ca2cl.common.files import writing
from ca2cl.slides.preview import Preview, draw_preview, drawn_slides, picture_side, write_preview
from ca2cl.slides.records import SlideRecord, without_shared_folder
from ca2cl.slides.scan import KEPT, REASONS
from ca2cl.slides.staging import Staging
from ca2cl.slides.tissue.mask import TissueMask

logger = logging.getLogger(__name__)


def write_previews(
    path: Path, records: Sequence[SlideRecord], staging: Staging, blurred: Callable[[int], Sequence[int]] | None = None
) -> None:
    """Draw slides into ``path``, a page or a sheet; one that failed is a line with its error.

    Args:
        path: of the page or sheet.
        records: of all slides.
        staging: their scans.
        blurred: numbers in the grid of a slide's blurred tiles; by default those that were cut and then dropped.

    Raises:
        InputError: the file cannot be written.
    """
    with writing(path, "give another file with --preview"):
        path.parent.mkdir(parents=True, exist_ok=True)
    drawn = drawn_slides(path, len(records))
    if len(drawn) < len(records):
        logger.warning("%s: %d of %d slides are drawn", path, len(drawn), len(records))
    side = picture_side(path, len(records))
    write_preview(path, _previews(records, staging, drawn, side, blurred or staging.blurred), len(records))


def _previews(
    records: Sequence[SlideRecord],
    staging: Staging,
    drawn: range,
    side: int,
    blurred: Callable[[int], Sequence[int]],
) -> Iterator[Preview]:
    shown = without_shared_folder([record.slide for record in records])
    for number, record in enumerate(records):
        if record.error is not None:
            yield Preview(shown[number], None, record.error)
        elif number in drawn:
            yield _drawn(number, shown[number], record, staging, side, blurred(number))


def _drawn(number: int, name: str, record: SlideRecord, staging: Staging, side: int, blurred: Sequence[int]) -> Preview:
    found, scan = staging.picture(number), staging.read_scan(number)
    if found is None or scan is None or scan.grid is None or record.mpp is None:
        return Preview(name, None, "not drawn: what its scan left is damaged")
    names = [REASONS[code] for code in found.reasons.tolist()]
    for tile in blurred:
        names[tile] = "blurred"
    boxes = scan.grid.boxes(scan.grid.corners()) * (record.mpp / found.overview_mpp)
    mask = TissueMask(found.tissue, found.artefacts, found.mpp)
    kept = np.array([name == KEPT for name in names])
    title = f"{name}: {record.kept} of {record.grid} tiles"
    return Preview(title, draw_preview(found.overview, mask, boxes, kept, names, title, side))
