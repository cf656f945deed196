"""Maps of slides with their tiles as squares.

Legend: N tiles of the page, M tiles of a slide.
"""

from __future__ import annotations

import base64
import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.spatial import cKDTree

from ca2cl.errors import InputError
from ca2cl.report.places.tile_places import Numbers, Places
from ca2cl.slides.records import SLIDES_NAME, SlideRecord, read_rows, thumbnail_path

MOST_SLIDES = 6
SIDE = 560
"""Longer side of a slide in the map's own units, about pixels on the screen."""
_LEAST = 7.0
"""Least side of a square, in these units; a tile of 100 µm on a slide of 2 cm has 3."""
_GAP = 0.9
_NUMBERED = 22.0
"""Least side of a square that has its cluster's number in it."""
_MOST_BAR = 0.25
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Square:
    """A tile on a map."""

    row: int
    """Of the page's tiles."""
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class SlideMap:
    """A slide, its tiles and a scale bar, in the map's units."""

    slide: str
    width: float
    height: float
    squares: list[Square]
    enlarged: bool
    """Squares are larger than the tiles, so that they can be seen."""
    kept: int | None
    """Tiles of the slide in the shards; None if not known."""
    thumbnail: str
    """``data:`` URI of the whole slide; empty if there is none."""
    picture: tuple[float, float]
    """Width and height of the slide itself: padded tiles reach beyond it."""
    size: str
    """Width and height in millimetres."""
    bar: float
    bar_text: str

    @property
    def numbered(self) -> bool:
        """True if the squares are large enough for a number."""
        return min(min(square.width, square.height) for square in self.squares) >= _NUMBERED


def draw_slides(places: Places, folder: Path) -> list[SlideMap]:
    """Maps of the slides with the most tiles on the page, at most ``MOST_SLIDES``.

    Args:
        places: of the page's tiles.
        folder: of the shards; its ``slides.jsonl`` and thumbnails are used if they are there.
    """
    counts = np.bincount(places.slide_N[places.slide_N >= 0], minlength=len(places.slides))
    chosen = np.argsort(-counts, kind="stable")[:MOST_SLIDES].tolist()
    records = _records(folder)
    return [_draw(places, number, records.get(places.slides[number]), folder) for number in chosen]


def _records(folder: Path) -> dict[str, tuple[int, SlideRecord]]:
    """Row and record of every slide that gave tiles, by name."""
    path = folder / SLIDES_NAME
    if not path.is_file():
        return {}
    try:
        return {record.slide: (row, record) for row, record in enumerate(read_rows(path)) if record.kept}
    except (InputError, OSError, ValueError) as error:
        logger.warning("slides are drawn without thumbnails: %s", error)
        return {}


def _draw(places: Places, number: int, found: tuple[int, SlideRecord] | None, folder: Path) -> SlideMap:
    rows = np.flatnonzero(places.slide_N == number)
    boxes_M4 = places.boxes_N4[rows]
    row, record = found or (-1, None)
    size = _size(record) if record else None
    whole = np.maximum(boxes_M4[:, 2:].max(axis=0), size or (0.0, 0.0))
    scale = SIDE / float(whole.max())
    width, height = (whole * scale).round(1).tolist()
    drawn_M4, enlarged = _visible(boxes_M4 * scale)
    bar = _round_length(float(whole[0]) * _MOST_BAR)
    picture = size or (float(whole[0]), float(whole[1]))
    return SlideMap(
        slide=places.names[number],
        width=width,
        height=height,
        squares=[Square(int(tile), *box) for tile, box in zip(rows.tolist(), drawn_M4.round(1).tolist(), strict=True)],
        enlarged=enlarged,
        kept=record.kept if record else None,
        thumbnail=_thumbnail(thumbnail_path(folder, row)) if size else "",
        picture=(round(picture[0] * scale, 1), round(picture[1] * scale, 1)),
        size=f"{picture[0] / 1000:.2f} x {picture[1] / 1000:.2f} mm" if size else "",
        bar=round(bar * scale, 1),
        bar_text=f"{bar / 1000:g} mm" if bar >= 1000 else f"{bar:g} µm",
    )


def _size(record: SlideRecord) -> tuple[float, float] | None:
    """Width and height of a slide in micrometres."""
    if record.mpp is None or not record.levels or len(record.levels[0]) < 2:
        return None
    width, height = (side * record.mpp for side in record.levels[0][:2])
    return (width, height) if min(width, height) > 0 else None


def _visible(boxes_M4: Numbers) -> tuple[Numbers, bool]:
    """Left, top, width and height of squares that can be seen: small ones grow as far as their neighbours allow."""
    sides_M2 = boxes_M4[:, 2:] - boxes_M4[:, :2]
    room = math.inf
    if len(boxes_M4) > 1:
        distance_M2, _ = cKDTree(boxes_M4[:, :2]).query(boxes_M4[:, :2], k=2, p=np.inf)
        room = _GAP * float(np.median(distance_M2[:, 1]))
    least = min(_LEAST, room)
    grown_M2 = np.maximum(sides_M2, least)
    corners_M2 = boxes_M4[:, :2] - (grown_M2 - sides_M2) / 2
    return np.concatenate([corners_M2, grown_M2], axis=1), bool((grown_M2 > sides_M2).any())


def _round_length(most: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten that is at most ``most``."""
    power = 10.0 ** math.floor(math.log10(most))
    return next(digit * power for digit in (5, 2, 1) if digit * power <= most * (1 + 1e-9))


def _thumbnail(path: Path) -> str:
    """A JPEG as a ``data:`` URI; empty if it is missing or damaged."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
            image.load()
    except (OSError, ValueError, SyntaxError):
        return ""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()
