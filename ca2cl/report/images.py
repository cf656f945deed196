"""Images as data URIs.

Legend: N tiles, T side of a thumbnail in pixels.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ca2cl.report.tiles import Pixels

CELL = 64
"""Side of a tile on a sprite: whole JPEG blocks, so that no tile bleeds into the next."""
_COLUMNS, _ROWS = 25, 20
_QUALITY, _FINE = 78, 88


@dataclass(frozen=True)
class Sprite:
    """Up to 500 tiles in one JPEG, row by row."""

    uri: str
    tiles: int


def jpeg_uri(pixels_HWC: Pixels, quality: int = _FINE) -> str:
    """An image as a ``data:`` URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def sprites(thumbs_NTTC: Pixels) -> list[Sprite]:
    """All tiles in a few sheets: small enough each for a phone's decoder, and without a JPEG header a tile."""
    step = _COLUMNS * _ROWS
    return [_sprite(thumbs_NTTC[first : first + step]) for first in range(0, len(thumbs_NTTC), step)]


def _sprite(thumbs_NTTC: Pixels) -> Sprite:
    rows = -(-len(thumbs_NTTC) // _COLUMNS)
    sheet = np.full((rows * CELL, _COLUMNS * CELL, 3), 255, np.uint8)
    for place, thumb in enumerate(thumbs_NTTC):
        top, left = (CELL * part for part in divmod(place, _COLUMNS))
        small = Image.fromarray(thumb).resize((CELL, CELL), Image.Resampling.LANCZOS)
        sheet[top : top + CELL, left : left + CELL] = np.asarray(small)
    return Sprite(jpeg_uri(sheet, _QUALITY), len(thumbs_NTTC))


def layout() -> dict[str, int]:
    """Layout of a sprite, for the page's script."""
    return {"cell": CELL, "columns": _COLUMNS, "each": _COLUMNS * _ROWS}
