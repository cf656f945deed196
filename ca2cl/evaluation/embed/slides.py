"""Tiles of slides by number, read from the slides themselves.

Slides are scanned first, which finds their tiles. No tile is written to the disk: what decodes a part's tiles reads
them from the slide.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ca2cl.common.files import writing
from ca2cl.common.records import parse_json
from ca2cl.data.loading.workers import Pixels
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.parts import REMEDY, Part, PartFacts, Parts
from ca2cl.evaluation.embed.tiles import BlurredTile, TilePlace, TileRow
from ca2cl.runtime.distributed import Ranks
from ca2cl.slides.collection import check_slides, listed, warn_of_failed
from ca2cl.slides.config import SlideOptions, slide_settings
from ca2cl.slides.listing import is_remote
from ca2cl.slides.previews import write_previews
from ca2cl.slides.readers.base import SlideError
from ca2cl.slides.readers.open import opened_slide
from ca2cl.slides.records import SlideRecord, write_rows
from ca2cl.slides.source import tile_key
from ca2cl.slides.stage import CutJob, fetch_slide, scan_slides, summary, without_twins
from ca2cl.slides.staging import Staging, StoredScan
from ca2cl.slides.tissue.sharpness import is_sharp

_FORM, _QUALITY = "png", 100
"""Of tiles that are cut; none are here."""


class SlideTiles:
    """Tiles of slides (``TileData``), slide by slide and row by row. There are none before ``scan``.

    Args:
        source: slides as ``list_slides`` takes them.
        split: of a CSV.
        options: of the tiles.
        seed: of the draw of ``max_tiles``.
        unlabelled: tiles have no classes.
        folder: for the scans.

    Raises:
        InputError: no slides, or settings that do not fit.
    """

    turned = 0  # slides have no such mark
    manifest_digest: str | None = None

    def __init__(
        self, source: str, split: str | None, options: SlideOptions, *, seed: int, unlabelled: bool, folder: Path
    ) -> None:
        listing = listed(source, split, options)
        job = CutJob(listing, options, Staging(folder), seed, _FORM, _QUALITY)
        self.name = listing.name
        self.digest = _digest([listing.digest, [job.state(number) for number in range(len(listing.slides))]])
        settings = json.dumps({**slide_settings(options), "seed": seed})
        self.settings: dict[str, Any] = parse_json(settings)  # with lists for tuples, as a file has them
        self.tile_size = options.tile, options.tile
        self.classes = [] if unlabelled else list(listing.labels)
        self.starts: tuple[int, ...] = (0,)
        """Number of each slide's first tile, and of all tiles."""
        # Scans do not depend on the encoder: another job of the same slides and settings takes them over.
        staging = Staging(folder / f"slides-{_digest([self.digest, self.settings])[:16]}")
        self.job = replace(job, staging=staging)
        self._unlabelled = unlabelled
        self._local = staging
        self._away: dict[int, str] = {}
        """Why remote slides could not be fetched."""
        self._scan: tuple[int, StoredScan] | None = None

    def __len__(self) -> int:
        return self.starts[-1]

    def scan(self, ranks: Ranks, workers: int, rows: Path) -> None:
        """Find the tiles.

        Args:
            ranks: share the slides.
            workers: processes of each rank.
            rows: the file of the slides' rows.

        Raises:
            InputError: no slide gives a tile, one failed with ``strict``, or a file cannot be written.
        """
        folder, slides = self.job.staging.folder, len(self.job.listing.slides)
        with writing(folder, REMEDY):
            folder.mkdir(parents=True, exist_ok=True)
        self._local = Staging(folder / f"rank-{ranks.rank}")
        mine = range(ranks.rank, slides, ranks.world)
        ranks.together(lambda: scan_slides(self.job, mine, workers))

        def count() -> tuple[list[int], list[str]]:
            scans = [self._stored(number) for number in range(slides)]
            records = without_twins(self.job, [scan.record for scan in scans])
            try:
                check_slides(records, rows, self.job.options.strict)
            except InputError:
                write_rows(rows, records, REMEDY)
                shutil.rmtree(folder, ignore_errors=True)
                raise
            return [record.kept for record in records], sorted({name for scan in scans for name in scan.classes})

        kept, classes = ranks.from_first(count)
        self.starts = tuple(itertools.accumulate(kept, initial=0))
        self.classes = [] if self._unlabelled else classes

    def slide_of(self, number: int) -> int:
        """Number of the slide of a tile."""
        return bisect.bisect_right(self.starts, number) - 1

    def group(self, number: int) -> str | None:
        """See ``TileData``."""
        return None

    def fill(self, number: int, out_HWC: Pixels) -> tuple[TileRow, Pixels | None]:
        """See ``TileData``."""
        slide = self.slide_of(number)
        if slide in self._away:
            raise SlideError(self._away[slide])
        scan, options = self._scan_of(slide), self.job.options
        grid, position = scan.grid, number - self.starts[slide]
        assert grid is not None and options.mpp is not None
        row, column = divmod(int(scan.kept[position]), grid.columns)
        pixels = grid.read(opened_slide(self._path(slide), tuple(scan.state)), column, row)
        if not is_sharp(pixels, options.mpp, options.least_sharpness):
            raise BlurredTile
        out_HWC[...] = pixels
        x, y, *_ = np.rint(grid.boxes(np.array([[column, row]]))[0]).astype(int).tolist()
        record, label = scan.record, int(scan.labels[position])
        place = TilePlace(record.slide, record.patient, x, y, options.mpp, grid.tile * grid.scale * grid.downsample)
        name = scan.classes[label] if label >= 0 and not self._unlabelled else None
        return TileRow(tile_key(record.slide, x, y), name, Path(record.path).name, place), None

    def _stored(self, slide: int) -> StoredScan:
        scan = self.job.staging.read_scan(slide)
        if scan is None:
            raise SlideError(f"{self.job.staging.folder}: the scan of slide {slide} is gone; run again")
        return scan

    def _scan_of(self, slide: int) -> StoredScan:
        """The scan, kept for the slide's next tile."""
        if self._scan is None or self._scan[0] != slide:
            self._scan = slide, self._stored(slide)
        return self._scan[1]

    def _path(self, slide: int) -> Path:
        return self._local.local_path(slide, self.job.listing.slides[slide].path)

    def batches(self, parts: Sequence[Part]) -> list[list[Part]]:
        """The parts, in order, so that a batch has those of local slides, or those of one remote slide."""

        def where(part: Part) -> int:
            slide = self.slide_of(part.first)
            return slide if is_remote(self.job.listing.slides[slide].path) else -1

        return [list(group) for _, group in itertools.groupby(parts, where)]

    @contextmanager
    def at_hand(self, parts: Sequence[Part]) -> Iterator[None]:
        """Copy the remote slide of a batch of parts, for as long as the block lasts."""
        slide = self.slide_of(parts[0].first)
        file = self.job.listing.slides[slide]
        if not is_remote(file.path):
            yield
            return
        try:
            fetch_slide(file, self._path(slide))
        except SlideError as error:
            self._away[slide] = str(error)
        try:
            yield
        finally:
            self._local.drop_local(slide)

    def close(self, parts: Parts, made: Sequence[PartFacts], rows: Path) -> list[tuple[Part, PartFacts]]:
        """Write the slides' rows and the preview; the parts of slides that could be read.

        Args:
            parts: of the job.
            made: what is known of each.
            rows: the file of the slides' rows.

        Raises:
            InputError: no tile is left, a slide failed with ``strict``, or a file cannot be written.
        """
        options, found = self.job.options, list(zip(parts, made, strict=True))
        failed: dict[int, str] = {}
        blurred = Counter[int]()
        for part, facts in found:
            slide = self.slide_of(part.first)
            blurred[slide] += facts.blurred
            if facts.failed is not None:
                failed.setdefault(slide, facts.failed)
        records = self._records(failed, blurred)
        write_rows(rows, records, REMEDY)
        check_slides(records, rows, options.strict)
        warn_of_failed(records, rows)
        found = [(part, facts) for part, facts in found if self.slide_of(part.first) not in failed]
        if options.preview is not None:
            of_slide = itertools.groupby((part for part, _ in found), lambda part: self.slide_of(part.first))
            held = {slide: list(some) for slide, some in of_slide}
            write_previews(
                Path(options.preview),
                records,
                self.job.staging,
                lambda slide: self._missing(slide, [parts.read(part) for part in held.get(slide, [])]),
            )
        sys.stdout.write(f"{summary(records)}\n")
        return found

    def _records(self, failed: Mapping[int, str], blurred: Mapping[int, int]) -> list[SlideRecord]:
        found = []
        for number, slide in enumerate(self.job.listing.slides):
            record = self._stored(number).record
            if number in failed:
                record = record.failed(failed[number].removeprefix(f"{slide.where}: "))
            elif count := blurred[number]:
                record = replace(record, kept=record.kept - count, dropped={**record.dropped, "blurred": count})
            found.append(record)
        return found

    def _missing(self, slide: int, tables: Sequence[pa.Table]) -> list[int]:
        """Numbers in the grid of the slide's tiles that were wanted and are in none of the tables."""
        scan = self._stored(slide)
        if scan.grid is None:
            return []
        places = np.rint(scan.grid.boxes(scan.grid.corners()[scan.kept])[:, :2]).astype(int).tolist()
        there = {place for table in tables for place in zip(*(table[name].to_pylist() for name in "xy"), strict=True)}
        return [int(tile) for tile, place in zip(scan.kept, places, strict=True) if tuple(place) not in there]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
