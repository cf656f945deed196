"""Scan and cut slides by several processes.

A slide is the unit of failure, a piece of its grid that of work.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import writing
from ca2cl.data.transfer.download import FetchPolicy, fetch
from ca2cl.data.transfer.errors import DiskFull
from ca2cl.errors import InputError
from ca2cl.runtime.pool import worker_pool
from ca2cl.slides.config import SlideOptions
from ca2cl.slides.cut import cut_piece
from ca2cl.slides.listing import Listing, SlideFile, file_state, is_remote
from ca2cl.slides.preview import drawn_slides
from ca2cl.slides.readers.base import SlideError
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.regions.read import find_mask
from ca2cl.slides.scan import Scan, scan_slide
from ca2cl.slides.staging import REMEDY, Staging

logger = logging.getLogger(__name__)
_SCAN = -1


@dataclass(frozen=True)
class CutJob:
    """Slides, and how they are cut."""

    listing: Listing
    options: SlideOptions
    staging: Staging
    seed: int
    form: str
    quality: int

    def path(self, number: int) -> Path:
        """The slide's local file; of a remote one the copy, which lasts until its tiles are written."""
        return self.staging.local_path(number, self.listing.slides[number].path)

    def is_drawn(self, number: int) -> bool:
        """True if the preview shows the slide."""
        preview = self.options.preview
        return preview is not None and number in drawn_slides(Path(preview), len(self.listing.slides))

    def state(self, number: int) -> list[int]:
        """Sizes and modification times of the slide's file and its annotation, by which a changed one is known."""
        slide = self.listing.slides[number]
        if self.options.mask is None:
            return list(slide.state)
        file = find_mask(Path(self.options.mask), Path(slide.path).name)
        return [*slide.state, *(file_state(file) if file is not None else ())]


def cut_slides(job: CutJob, workers: int) -> list[SlideRecord]:
    """Scan and cut all slides that an earlier run has not; their records in the order of the list.

    Raises:
        InputError: a file cannot be written, or a process was killed.
    """
    numbers = range(len(job.listing.slides))
    records, failed = _dispatch(job, numbers, workers, cut=True)
    return without_twins(job, [records[number] for number in numbers], failed)


def scan_slides(job: CutJob, numbers: Sequence[int], workers: int) -> None:
    """Scan these slides, unless an earlier run has, without cutting a tile.

    Args:
        job: the slides.
        numbers: those to scan.
        workers: processes.

    Raises:
        InputError: a file cannot be written, or a process was killed.
    """
    _dispatch(job, numbers, max(min(workers, len(numbers)), 1), cut=False)


def _dispatch(
    job: CutJob, numbers: Sequence[int], workers: int, *, cut: bool
) -> tuple[dict[int, SlideRecord], dict[int, str]]:
    """Records of these slides by their number, and errors of those of which a tile did not decode."""
    records: dict[int, SlideRecord] = {}
    title = "cut" if cut else "scan"
    with worker_pool(workers) as pool, ProgressBar(total=len(numbers), unit="slide", desc=title) as bar:
        dispatch = _Dispatch(job, pool, workers, numbers, cut=cut)
        for number, record in dispatch.run():
            records[number] = record
            bar.update()
    return records, dispatch.failed


class _Dispatch:
    """Hands out scans and pieces, so that no process waits for a slide that another one is at."""

    def __init__(self, job: CutJob, pool: Executor, workers: int, numbers: Sequence[int], *, cut: bool) -> None:
        self._job, self._pool, self._most, self._cut = job, pool, 2 * workers, cut
        self._scans = iter(numbers)
        self._pieces: deque[tuple[int, int]] = deque()
        self._pending: dict[Future[Any], tuple[int, int]] = {}
        self._left: dict[int, int] = {}
        """Pieces of a slide that have not ended."""
        self._first: dict[str, int] = {}
        """First slide of those scanned so far with a digest."""
        self.failed: dict[int, str] = {}
        """Errors of slides of which a tile did not decode."""

    def run(self) -> Iterator[tuple[int, SlideRecord]]:
        """Yield number and record of each slide when it is done."""
        while self._fill():
            done = wait(self._pending, return_when=FIRST_COMPLETED).done
            for future in sorted(done, key=self._pending.__getitem__):  # of copies the first is cut
                slide, piece = self._pending.pop(future)
                if piece == _SCAN:
                    pieces, digest = future.result()
                    if not self._cut or self._is_twin(slide, digest):
                        pieces = 0
                    self._left[slide] = pieces
                    self._pieces += [(slide, number) for number in range(pieces)]
                else:
                    self._end_piece(slide, future)
                if self._left[slide] == 0:
                    yield slide, _close(self._job, slide, self.failed.get(slide), cut=self._cut)

    def _is_twin(self, slide: int, digest: str | None) -> bool:
        """True if an earlier slide is known to have this digest: its tiles need not be cut twice."""
        if digest is None:
            return False
        first = self._first.get(digest, slide)
        self._first[digest] = min(first, slide)
        return first < slide

    def _fill(self) -> bool:
        """Submit what there is room for; False if nothing is left."""
        job = self._job
        while len(self._pending) < self._most:
            if self._pieces:
                slide, piece = self._pieces.popleft()
                assert job.options.mpp is not None
                future: Future[Any] = self._pool.submit(
                    cut_piece, job.staging, slide, piece, job.path(slide), job.options.mpp, job.options.least_sharpness,
                    job.form, job.quality,
                )  # fmt: skip
            elif (slide := next(self._scans, -1)) >= 0:
                piece = _SCAN
                future = self._pool.submit(
                    _scan,
                    job.staging,
                    slide,
                    job.listing.slides[slide],
                    job.state(slide),
                    job.path(slide),
                    job.options,
                    job.seed,
                    job.is_drawn(slide),
                    self._cut,
                )
            else:
                break
            self._pending[future] = (slide, piece)
        return bool(self._pending)

    def _end_piece(self, slide: int, future: Future[Any]) -> None:
        self._left[slide] -= 1
        try:
            future.result()
        except SlideError as error:
            self.failed.setdefault(slide, str(error))
            dropped = [one for one in self._pieces if one[0] == slide]
            self._left[slide] -= len(dropped)
            self._pieces = deque(one for one in self._pieces if one[0] != slide)


def _scan(
    staging: Staging, number: int, slide: SlideFile, state: list[int], path: Path, options: SlideOptions, seed: int,
    drawn: bool, cut: bool,
) -> tuple[int, str | None]:  # fmt: skip
    """Scan a slide, unless an earlier run has; the number of its pieces, and its digest if it can be used.

    A remote slide stays until it is ``cut``.
    """
    known = staging.read_scan(number)
    current = known is not None and known.state == state and known.record.error is None
    if drawn and staging.picture(number) is None:
        current = False  # scanned without --preview
    if known is not None and current:
        if (
            cut
            and is_remote(slide.path)
            and not all(staging.read_piece(number, piece) for piece in range(known.pieces))
        ):
            fetch_slide(slide, path)
        return known.pieces, known.record.digest
    staging.forget(number)
    try:
        if is_remote(slide.path):
            fetch_slide(slide, path)
        scan = scan_slide(slide, path, state, options, seed)
    except SlideError as error:
        reason = str(error).removeprefix(f"{slide.where}: ")
        scan = Scan(SlideRecord(slide.name, slide.where, slide.patient, slide.label).failed(reason))
    staging.write_scan(number, state, scan, drawn)
    known = staging.read_scan(number)
    assert known is not None
    return known.pieces, known.record.digest if known.record.error is None else None


def fetch_slide(slide: SlideFile, path: Path) -> None:
    """Copy a remote slide, unless it is there.

    Raises:
        SlideError: it cannot be fetched.
        DiskFull: there is no room for it.
    """
    if path.exists():
        return
    with writing(path.parent, REMEDY):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fetch(slide.path, path, FetchPolicy())
    except DiskFull:
        raise
    except InputError as error:
        raise SlideError(str(error)) from None


def _close(job: CutJob, number: int, error: str | None, *, cut: bool) -> SlideRecord:
    """The record of a slide whose pieces have ended; of one that is not cut, that of its scan."""
    scan = job.staging.read_scan(number)
    assert scan is not None
    record = scan.record
    job.staging.drop_local(number)
    if not cut:
        return record
    if error is not None:
        record = record.failed(error.removeprefix(f"{job.path(number)}: "))
        job.staging.forget(number)
        job.staging.write_scan(number, job.state(number), Scan(record), preview=False)
        return record
    pieces = [job.staging.read_piece(number, piece) for piece in range(scan.pieces)]
    found = [piece for piece in pieces if piece is not None]
    blurred = sum(piece.blurred for piece in found)
    dropped = record.dropped | ({"blurred": blurred} if blurred else {})
    seconds = round(record.seconds + sum(piece.seconds for piece in found), 3)
    return replace(record, kept=sum(len(piece.numbers) for piece in found), dropped=dropped, seconds=seconds)


def without_twins(job: CutJob, records: list[SlideRecord], failed: Container[int] = ()) -> list[SlideRecord]:
    """Slides with the content of an earlier one give no tiles: files of one DICOM series, or copies.

    Args:
        job: the job.
        records: of all slides.
        failed: slides of which a tile did not decode. Their copies would fail, too, and were not cut.
    """
    first: dict[str, str] = {}
    kept = []
    for number, record in enumerate(records):
        usable = record.digest is not None and (record.error is None or number in failed)
        known = first.setdefault(record.digest or "", record.slide) if usable else record.slide
        if known != record.slide:
            record = record.failed(f"the same slide as {known}")  # noqa: PLW2901
            job.staging.forget(number)
            job.staging.write_scan(number, job.state(number), Scan(record), preview=False)
        kept.append(record)
    return kept


def summary(records: list[SlideRecord]) -> str:
    """Two lines: slides that gave tiles, and tiles that were dropped, by reason."""
    failed = sum(record.error is not None for record in records)
    empty = sum(record.kept == 0 for record in records) - failed
    dropped = Counter[str]()
    for record in records:
        dropped.update(record.dropped)
    good = len(records) - failed - empty
    why = ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()) or "none"
    return f"slides   {good} of {len(records)}; {failed} failed, {empty} gave no tile\ndropped  {why}"
