"""Scan a slide: its resolution, tissue and tiles."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
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
from ca2cl.slides.readers.open import opened_slide
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.regions.read import check_inside, find_mask, read_regions
from ca2cl.slides.regions.shares import OUTSIDE, classify_tiles
from ca2cl.slides.tissue.mask import MASK_TILE_PIXELS, TissueMask, shares, tissue_mask

KEPT = "kept"
REASONS = (KEPT, "background", "pen", "black", "fold", "outside", "surplus", "unscanned")
"""What becomes of a tile of the grid, by its code in ``Scan.reasons``."""
_MOST_MASK_PIXELS = 16e6
_SHOWN, _PREVIEWED = 512, 1000
"""Least longer side in pixels of the overview of a small slide, whose mask has too few pixels for a picture."""
_NO_CLASS = -1


@dataclass(frozen=True)
class Scan:
    """What a scan found."""

    record: SlideRecord
    grid: Grid | None = None
    reasons: npt.NDArray[np.uint8] | None = None
    """Code in ``REASONS`` of every tile of the grid."""
    labels: npt.NDArray[np.int32] | None = None
    """Index into ``classes`` of every tile of the grid, -1 for none."""
    classes: tuple[str, ...] = ()
    overview: Pixels | None = None
    """The whole slide at ``overview_mpp``, for pictures."""
    overview_mpp: float | None = None
    mask: TissueMask | None = None

    @property
    def kept(self) -> npt.NDArray[np.int64]:
        """Numbers in the grid of the tiles to cut, in the order of ``Grid.by_squares``."""
        assert self.reasons is not None and self.grid is not None
        return self.grid.by_squares(np.flatnonzero(self.reasons == 0))


def scan_slide(slide: SlideFile, path: Path, state: Sequence[int], options: SlideOptions, seed: int) -> Scan:
    """Open a slide and choose its tiles. A slide that cannot be used gives a record with the error, and no tiles.

    Args:
        slide: of the list.
        path: the local file.
        state: of the file, see ``CutJob.state``.
        options: of the job.
        seed: of the draw of ``max_tiles``.
    """
    started = time.perf_counter()
    scanner = _Scanner(slide, options, seed)
    try:
        found = scanner.scan(opened_slide(path, tuple(state)))
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
        mpp, origin = resolution(slide, reader.mpp, reader.hint, options.assume_mpp)
        self._note(mpp=mpp, mpp_from=origin)
        grid = make_grid(
            reader.levels, mpp, options.mpp, tile=options.tile, overlap=options.overlap, pad=options.edge == "pad"
        )
        self._note(level=grid.level, scale=grid.scale, grid=len(grid))
        boxes = grid.boxes(grid.corners())
        reasons = np.zeros(len(grid), np.uint8)
        reasons[_unscanned(reader.bounds, boxes)] = REASONS.index("unscanned")
        labels, classes = _classify(slide, reader, options, boxes, reasons)
        overview, overview_mpp, mask = None, None, None
        if options.tissue > 0 or options.preview:
            overview_mpp = _mask_mpp(reader, mpp, options)
            overview = read_overview(reader, mpp, overview_mpp)
            mask = tissue_mask(overview, overview_mpp)
            _drop_background(mask, boxes * (mpp / mask.mpp), options.tissue, reasons)
            self._note(tissue=round(float(mask.tissue.mean()), 4))
            if (finer := _picture_mpp(reader, mpp, _PREVIEWED if options.preview else _SHOWN)) < overview_mpp:
                with suppress(SlideError):  # its tiles are read all the same
                    overview, overview_mpp = read_overview(reader, mpp, finer), finer
        if options.max_tiles is not None:
            _drop_surplus(slide.name, self._seed, options.max_tiles, reasons)
        counts = Counter(REASONS[code] for code in reasons.tolist())
        self._note(kept=counts.pop(KEPT, 0), dropped=dict(counts))
        return Scan(self.record, grid, reasons, labels, classes, overview, overview_mpp, mask)


def _unscanned(bounds: tuple[int, int, int, int], boxes: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    """True for tiles of the empty canvas around what was scanned, (N,)."""
    left, top, right, bottom = bounds
    beyond = (boxes[:, 0] >= right) | (boxes[:, 1] >= bottom) | (boxes[:, 2] <= left) | (boxes[:, 3] <= top)
    return np.asarray(beyond)


def _mask_mpp(reader: SlideReader, mpp: float, options: SlideOptions) -> float:
    """Micrometres a pixel of the mask."""
    assert options.mpp is not None
    whole = reader.levels[0]
    least = mpp * math.sqrt(whole.width * whole.height / _MOST_MASK_PIXELS)
    return max(options.tile * options.mpp / MASK_TILE_PIXELS, least, mpp)


def _picture_mpp(reader: SlideReader, mpp: float, side: int) -> float:
    """Micrometres a pixel of a picture whose longer side has ``side`` pixels, or fewer if the slide has."""
    return mpp * max(max(reader.levels[0].width, reader.levels[0].height) / side, 1.0)


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
            reasons[reasons == 0] = REASONS.index("outside")
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
    reasons[(found == OUTSIDE) & (reasons == 0)] = REASONS.index("outside")
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
