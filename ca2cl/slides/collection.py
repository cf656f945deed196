"""The slides of a ``ca2cl shard`` job, as a source of tiles."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ca2cl.common.files import check_writable, write_atomic, writing
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError
from ca2cl.slides.config import SlideOptions
from ca2cl.slides.listing import Listing, list_slides
from ca2cl.slides.records import SLIDES_NAME, SlideRecord, thumbnail_path, write_rows
from ca2cl.slides.source import SlideSource
from ca2cl.slides.stage import CutJob, cut_slides, summary
from ca2cl.slides.staging import REMEDY, Staging

logger = logging.getLogger(__name__)
_CUT_NAME = "cut.json"
_SHOWN = 3


class NoTiles(InputError):
    """No slide gave a tile."""


def listed(source: str, split: str | None, options: SlideOptions) -> Listing:
    """The slides of ``source`` as ``list_slides`` finds them, if ``options`` fit them.

    Raises:
        InputError: no slides, or settings that do not fit.
    """
    if options.mask is not None and not Path(options.mask).exists():
        raise InputError(f"mask is {options.mask!r}: not there; give a folder of annotations or one file")
    if options.preview is not None:
        check_writable(Path(options.preview), "preview")
    found = list_slides(source, split)
    if options.mask is not None and Path(options.mask).is_file() and len(found.slides) > 1:
        raise InputError(
            f"mask is {options.mask!r}: one file for {len(found.slides)} slides; give a folder with a file for each"
        )
    return found


class SlideJob:
    """Slides to cut into a folder.

    Args:
        source: as ``list_slides`` takes it.
        split: of a CSV.
        options: of the tiles.
        folder: for what lies between slides and shards.
        seed: of the draw of ``max_tiles``.
        form: ``jpeg``, ``webp`` or ``png``.
        quality: of jpeg and webp.

    Raises:
        InputError: no slides, or settings that do not fit.
    """

    def __init__(
        self, source: str, split: str | None, options: SlideOptions, folder: Path, *, seed: int, form: str, quality: int
    ) -> None:
        assert options.mpp is not None
        self._listing = listed(source, split, options)
        self._job = CutJob(self._listing, options, Staging(folder), seed, form, quality)
        self.name, self.digest = self._listing.name, self._listing.digest
        self.classes: list[str] = []

    def cut(self, out: Path, workers: int) -> SlideSource:
        """Cut all tiles that an earlier run has not, and write ``slides.jsonl``, the thumbnails and the preview.

        Raises:
            NoTiles: no slide gave one.
            InputError: a slide failed with ``strict``, or slides changed since they were cut.
        """
        staging, options = self._job.staging, self._job.options
        with writing(staging.folder, REMEDY):
            staging.folder.mkdir(parents=True, exist_ok=True)
        records = self._cut_before()
        if records is None or not staging.tiles_path.exists():  # gone once the shards were done, of which one is lost
            records = cut_slides(self._job, workers)
            staging.tiles_path.unlink(missing_ok=True)  # of a run that was killed before it had noted its slides
            write_rows(out / SLIDES_NAME, records, REMEDY)
            _keep_thumbnails(records, staging, out)
            if options.preview is not None:
                from ca2cl.slides.previews import write_previews

                write_previews(Path(options.preview), records, staging)
            check_slides(records, out / SLIDES_NAME, options.strict)
            warn_of_failed(records, out / SLIDES_NAME)
        assert options.mpp is not None
        source = SlideSource(self.name, self.digest, records, staging, options.mpp, self._job.form)
        content = {"records": [asdict(record) for record in records], "states": self._states()}
        if source.classes and (bare := int((source.labels < 0).sum())):
            logger.warning(
                "%d of %d tiles have no class, because their annotations have none; give these one, or leave them out",
                bare,
                len(source),
            )
        write_atomic(staging.folder / _CUT_NAME, json.dumps(content).encode(), REMEDY)
        sys.stdout.write(f"{summary(records)}\n")
        return source

    def check_unchanged(self) -> None:
        """Refuse slides that changed since a finished job cut them."""
        self._cut_before()
        if self._job.options.preview is not None:
            logger.warning(
                "%s: not drawn, for all tiles are cut; give --preview from the start", self._job.options.preview
            )

    def clear(self) -> None:
        """Remove what only an unfinished job needs."""
        for path in self._job.staging.folder.iterdir():
            if path.name != _CUT_NAME:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _states(self) -> list[list[int]]:
        return [self._job.state(number) for number in range(len(self._listing.slides))]

    def _cut_before(self) -> list[SlideRecord] | None:
        """Records of an earlier run that has cut all slides; None if there was none."""
        path = self._job.staging.folder / _CUT_NAME
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            return None
        states = self._states()
        changed = [
            slide.name
            for slide, before, now in zip(self._listing.slides, content["states"], states, strict=True)
            if before != now
        ]
        if changed:
            raise InputError(
                f"{changed[0]}: the slide was changed after its tiles were cut, as {len(changed)} of {len(states)} "
                "were; give another folder"
            )
        return [SlideRecord(**record) for record in content["records"]]


def _keep_thumbnails(records: list[SlideRecord], staging: Staging, out: Path) -> None:
    """Move the thumbnails of slides that gave tiles into the folder of the shards."""
    for number, record in enumerate(records):
        path, target = staging.thumbnail_path(number), thumbnail_path(out, number)
        if record.kept and path.exists():
            with writing(target, REMEDY):
                target.parent.mkdir(exist_ok=True)
                path.replace(target)


def check_slides(records: Sequence[SlideRecord], rows: Path, strict: bool) -> None:
    """Refuse slides of which none gives a tile.

    Args:
        records: of all slides.
        rows: the file that has them, for the message.
        strict: refuse slides of which one failed, too.

    Raises:
        NoTiles: none does.
        InputError: one failed, and ``strict`` is set.
    """
    failed = [record for record in records if record.error is not None]
    first = f"{failed[0].path}: {failed[0].error}" if failed else ""
    if failed and strict:
        raise InputError(
            f"{first}; {len(failed)} of {len(records)} slides failed, see {rows}; leave --strict out to go on"
        )
    if not any(record.kept for record in records):
        dropped = ", ".join(f"{reason} {count}" for reason, count in records[0].dropped.items())
        why = first or f"{records[0].slide}: all tiles dropped ({dropped})"
        raise NoTiles(f"no slide gave a tile, see {rows}; the first: {why}")


def warn_of_failed(records: Sequence[SlideRecord], rows: Path) -> None:
    """Name slides that gave nothing."""
    failed = [record for record in records if record.error is not None]
    for record in failed[:_SHOWN]:
        logger.warning("%s: %s", record.path, record.error)
    if len(failed) > _SHOWN:
        logger.warning("%d more slides failed, see %s", len(failed) - _SHOWN, rows)
    if empty := [record.slide for record in records if record.error is None and not record.kept]:
        logger.warning("%d slides gave no tile (%s first), see %s", len(empty), empty[0], rows)
