"""Scan a slide: its resolution, tissue and tiles."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.errors import InputError
from ca2cl.slides.config import SlideOptions
from ca2cl.slides.grid import Grid, choose_level, make_grid, read_scaled
from ca2cl.slides.listing import SlideFile, resolution
from ca2cl.slides.readers.base import Pixels, SlideError, SlideReader
from ca2cl.slides.readers.open import open_slide
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.regions.read import check_inside, find_mask, read_regions
from ca2cl.slides.regions.shares import OUTSIDE, classify_tiles
from ca2cl.slides.tissue.mask import MASK_TILE_PIXELS, TissueMask, shares, tissue_mask

KEPT = "kept"
REASONS = (KEPT, "background", "pen", "black", "fold", "outside", "surplus")
"""What becomes of a tile of the grid, by its code in ``Scan.reasons``."""
_MOST_MASK_PIXELS = 16e6
_NO_CLASS = -1


@dataclass(frozen=True)
class Scan:
    """What a scan found. ``kept``: numbers in the grid of the tiles to cut, in order."""

    record: SlideRecord
    grid: Grid | None = None
    reasons: npt.NDArray[np.uint8] | None = None
    """Code in ``REASONS`` of every tile of the grid."""
    labels: npt.NDArray[np.int32] | None = None
    """Index into ``classes`` of every tile of the grid, -1 for none."""
    classes: tuple[str, ...] = ()
    overview: Pixels | None = None
    """The whole slide at ``mask.mpp``."""
    mask: TissueMask | None = None

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """Numbers in the grid of the tiles to cut, in order."""
        assert self.reasons is not None
        return np.flatnonzero(self.reasons == 0)


def scan_slide(slide: SlideFile, path: Path, options: SlideOptions, seed: int) -> Scan:
    """Open a slide and choose its tiles. A slide that cannot be used gives a record with the error, and no tiles.

    Args:
        slide: of the list.
        path: the local file.
        options: of the job.
        seed: of the draw of ``max_tiles``.
    """
    started = time.perf_counter()
    scanner = _Scanner(slide, options, seed)
    try:
        reader = open_slide(path)
        try:
            found = scanner.scan(reader)
        finally:
            reader.close()
    except SlideError as error:
        found = Scan(scanner.record.failed(str(error).removeprefix(f"{path}: ")))
    return replace(found, record=replace(found.record, seconds=round(time.perf_counter() - started, 3)))


class _Scanner:
    """Scan of one slide. ``record`` has what is known of it so far, also after an error."""

    def __init__(self, slide: SlideFile, options: SlideOptions, seed: int) -> None:
        self.record = SlideRecord(slide.name, slide.where, slide.patient, slide.label)
        self._slide, self._options, self._seed = slide, options, seed

    def _note(self, **facts: Any) -> None:
        self.record = replace(self.record, **facts)

    def scan(self, reader: SlideReader) -> Scan:
        """The scan.

        Raises:
            SlideError: the slide cannot be used.
        """
        slide, options = self._slide, self._options
        assert options.mpp is not None
        levels = [[level.width, level.height, level.downsample] for level in reader.levels]
        self._note(digest=reader.digest, vendor=reader.vendor, levels=levels)
        mpp, origin = resolution(slide, reader.mpp, reader.magnification, options.assume_mpp)
        self._note(mpp=mpp, mpp_from=origin)
        grid = make_grid(
            reader.levels, mpp, options.mpp, tile=options.tile, overlap=options.overlap, pad=options.edge == "pad"
        )
        self._note(level=grid.level, scale=grid.scale, grid=len(grid))
        boxes = grid.boxes(grid.corners())
        reasons = np.zeros(len(grid), np.uint8)
        labels, classes = _classify(slide, reader, options, boxes, reasons)
        overview, mask = None, None
        if options.tissue > 0 or options.preview:
            overview, mask_mpp = _overview(reader, mpp, options)
            mask = tissue_mask(overview, mask_mpp)
            _drop_background(mask, boxes * (mpp / mask.mpp), options.tissue, reasons)
            self._note(tissue=round(float(mask.tissue.mean()), 4))
        if options.max_tiles is not None:
            _drop_surplus(slide.name, self._seed, options.max_tiles, reasons)
        counts = Counter(REASONS[code] for code in reasons.tolist())
        self._note(kept=counts.pop(KEPT, 0), dropped=dict(counts))
        return Scan(self.record, grid, reasons, labels, classes, overview, mask)


def _overview(reader: SlideReader, mpp: float, options: SlideOptions) -> tuple[Pixels, float]:
    """The whole slide at the resolution of the mask, and its micrometres a pixel."""
    assert options.mpp is not None
    whole = reader.levels[0]
    least = mpp * math.sqrt(whole.width * whole.height / _MOST_MASK_PIXELS)
    wanted = max(options.tile * options.mpp / MASK_TILE_PIXELS, least, mpp)
    return read_overview(reader, mpp, wanted), wanted


def read_overview(reader: SlideReader, mpp: float, wanted: float) -> Pixels:
    """The whole slide at ``wanted`` micrometres a pixel, from its left upper corner.

    Args:
        reader: of the slide.
        mpp: micrometres a pixel of level 0.
        wanted: of the result, ``mpp`` or more.

    Raises:
        SlideError: it does not decode.
    """
    level, scale = choose_level(reader.levels, mpp, wanted)
    width = max(math.floor(reader.levels[level].width / scale), 1)
    height = max(math.floor(reader.levels[level].height / scale), 1)
    return read_scaled(reader, level, scale, 0, 0, width, height)


def _classify(
    slide: SlideFile, reader: SlideReader, options: SlideOptions, boxes: npt.NDArray[np.float64],
    reasons: npt.NDArray[np.uint8],
) -> tuple[npt.NDArray[np.int32], tuple[str, ...]]:  # fmt: skip
    """Classes of tiles by the slide's annotation or label; marks tiles outside of all annotations."""
    classes: tuple[str, ...] = (slide.label,) if slide.label else ()
    labels = np.full(len(boxes), 0 if slide.label else _NO_CLASS, np.int32)
    if options.mask is None:
        return labels, classes
    whole = reader.levels[0]
    try:
        file = find_mask(Path(options.mask), Path(slide.path).name)
        if file is None:
            reasons[:] = REASONS.index("outside")
            return labels, classes
        regions = read_regions(file, options.mask_exclude)
        check_inside(regions, whole.width, whole.height)
    except InputError as error:
        raise SlideError(str(error)) from None
    if regions.classes and slide.label:
        raise SlideError(f"{file}: has classes, and the CSV a label; leave one of them out")
    if regions.classes:
        classes = tuple(regions.classes)
    found = classify_tiles(regions, boxes, options.mask_share, classes if regions.classes else ())
    reasons[found == OUTSIDE] = REASONS.index("outside")
    if regions.classes:
        labels = np.where(found >= 0, found, _NO_CLASS).astype(np.int32)
    return labels, classes


def _drop_background(
    mask: TissueMask, boxes: npt.NDArray[np.float64], least: float, reasons: npt.NDArray[np.uint8]
) -> None:
    """Mark tiles with too little tissue, with the artefact that they are made of if there is one."""
    tissue = shares(mask.tissue, boxes)
    poor = (reasons == 0) & (tissue < least) if least > 0 else np.zeros(len(boxes), bool)
    reasons[poor] = REASONS.index("background")
    for name, where in mask.artefacts.items():
        reasons[poor & (tissue + shares(where, boxes) >= least)] = REASONS.index(name)


def _drop_surplus(name: str, seed: int, most: int, reasons: npt.NDArray[np.uint8]) -> None:
    """Keep ``most`` tiles, drawn by the seed and the slide's name alone."""
    kept = np.flatnonzero(reasons == 0)
    if len(kept) <= most:
        return
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:16], "little")
    words = np.random.Philox(key=key).random_raw(len(kept))
    surplus = np.argsort(words, kind="stable")[most:]
    reasons[kept[surplus]] = REASONS.index("surplus")
