"""Rows of ``slides.jsonl``: what became of each slide."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from ca2cl.common.files import write_atomic
from ca2cl.common.records import parse_record

SLIDES_NAME = "slides.jsonl"


def without_shared_folder(slides: Sequence[str]) -> list[str]:
    """Names of slides to show, without the folder that all of them are in."""
    parts = [slide.split("/") for slide in slides]
    shared = os.path.commonprefix([part[:-1] for part in parts])
    return ["/".join(part[len(shared) :]) for part in parts]


def thumbnail_path(folder: Path, row: int) -> Path:
    """Of the thumbnail of the slide in this row of ``slides.jsonl``, counted from 0, in the folder of the shards."""
    return folder / "thumbnails" / f"{row:06d}.jpg"


@dataclass(frozen=True)
class SlideRecord:
    """One slide: what it is, and how many tiles it gave."""

    slide: str
    """Its name, as in the tiles' ``.json``."""
    path: str
    patient: str | None = None
    label: str | None = None
    digest: str | None = None
    """``ALGORITHM:HEXADECIMAL`` of its content; None if it was not opened."""
    vendor: str | None = None
    mpp: float | None = None
    """Micrometres a pixel of level 0."""
    mpp_from: str | None = None
    """``csv``, ``slide`` or ``assumed``."""
    levels: list[list[float]] = field(default_factory=list)
    """Width, height and downsample of each level."""
    level: int | None = None
    """The one that tiles are read from."""
    scale: float | None = None
    """Its pixels to a pixel of a tile."""
    tissue: float | None = None
    """Share of the slide that is tissue."""
    grid: int = 0
    """Tiles of the grid."""
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Tiles that were not kept, by reason."""
    seconds: float = 0.0
    """Of computing, all processes together."""
    error: str | None = None

    def failed(self, error: str) -> SlideRecord:
        """The row of a slide that gives no tiles because of an error."""
        return replace(self, kept=0, error=error)


def write_rows(path: Path, records: Iterable[SlideRecord], remedy: str) -> None:
    """Write ``slides.jsonl``."""
    lines = [json.dumps(asdict(record)) for record in records]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode(), remedy)


def read_rows(path: Path) -> list[SlideRecord]:
    """The rows of a ``slides.jsonl``.

    Raises:
        InputError: it is missing or damaged.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    return [parse_record(line, SlideRecord, path, "shard the slides again") for line in lines]
