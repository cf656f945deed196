"""Draw the slides of a job, from what their scans left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from ca2cl.common.files import writing
from ca2cl.slides.preview import Preview, draw_preview, picture_side, write_preview
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.scan import KEPT, REASONS
from ca2cl.slides.staging import Staging
from ca2cl.slides.tissue.mask import TissueMask


def write_previews(
    path: Path, records: Sequence[SlideRecord], staging: Staging, blurred: Callable[[int], Sequence[int]] | None = None
) -> None:
    """Draw every slide into ``path``, a page or a sheet; one that was not scanned is a line with its error.

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
    entries = _previews(records, staging, picture_side(path, len(records)), blurred or staging.blurred)
    write_preview(path, entries, len(records))


def _previews(
    records: Sequence[SlideRecord], staging: Staging, side: int, blurred: Callable[[int], Sequence[int]]
) -> Iterator[Preview]:
    for number, record in enumerate(records):
        title = f"{record.slide}: {record.kept} of {record.grid} tiles"
        found = staging.picture(number)
        if record.error is not None or found is None:
            yield Preview(record.slide, None, record.error or "")
            continue
        scan = staging.read_scan(number)
        assert scan is not None and scan.grid is not None and record.mpp is not None
        names = [REASONS[code] for code in found.reasons.tolist()]
        for tile in blurred(number):
            names[tile] = "blurred"
        boxes = scan.grid.boxes(scan.grid.corners()) * (record.mpp / found.mpp)
        mask = TissueMask(found.tissue, found.artefacts, found.mpp)
        kept = np.array([name == KEPT for name in names])
        yield Preview(title, draw_preview(found.overview, mask, boxes, kept, names, title, side))
