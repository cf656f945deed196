"""JPEG tiles of a TIFF file, decoded one by one.

OpenSlide paints every tile on a canvas with transparency, which takes five times as long as to decode it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

from ca2cl.common.optional import need
from ca2cl.slides.readers.base import Level, Pixels

logger = logging.getLogger(__name__)
_JPEG, _RGB, _YCBCR = 7, 2, 6
"""TIFF's compression, and photometric interpretations."""
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
"""A marker; a byte behind it says what the components are, 0 for RGB and 1 for YCbCr. For tiles their TIFF says it."""


class JpegTiles:
    """The tiles of one level.

    Args:
        path: the TIFF file.
        page: of tifffile, with JPEG tiles.
        background: colour beyond the level's edge.
    """

    def __init__(self, path: Path, page: Any, background: tuple[int, int, int]) -> None:
        self._file = path.open("rb")
        self._offsets, self._sizes = page.dataoffsets, page.databytecounts
        self._width, self._height = page.imagewidth, page.imagelength
        self.tile = page.tilewidth, page.tilelength
        self._columns = -(-self._width // page.tilewidth)
        tables = page.jpegtables
        self._head = b"\xff\xd8" + _ADOBE + bytes([page.photometric == _YCBCR]) + (tables[2:-2] if tables else b"")
        self._background = background

    def read(self, x: int, y: int, width: int, height: int) -> Pixels | None:
        """Pixels as of ``SlideReader.read``; None if a tile is missing or does not decode."""
        out = np.empty((height, width, 3), np.uint8)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, self._width), min(y + height, self._height)
        if (right - left, bottom - top) != (width, height):
            out[:] = self._background
        if left >= right or top >= bottom:
            return out
        wide, high = self.tile
        for row in range(top // high, -(-bottom // high)):
            for column in range(left // wide, -(-right // wide)):
                pixels = self._decoded(row * self._columns + column)
                if pixels is None:
                    return None
                x0, y0 = column * wide, row * high
                first, last = (max(left, x0), max(top, y0)), (min(right, x0 + wide), min(bottom, y0 + high))
                out[first[1] - y : last[1] - y, first[0] - x : last[0] - x] = pixels[
                    first[1] - y0 : last[1] - y0, first[0] - x0 : last[0] - x0
                ]
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def whole_tile(self) -> tuple[int, int] | None:
        """Corner of a tile that decodes, of the middle one if possible."""
        count = len(self._offsets)
        for number in (count // 2 + self._columns // 2, count // 2, 0):
            if number < count and self._decoded(number) is not None:
                row, column = divmod(number, self._columns)
                return column * self.tile[0], row * self.tile[1]
        return None

    def _decoded(self, number: int) -> Pixels | None:
        data = os.pread(self._file.fileno(), self._sizes[number], self._offsets[number])
        try:
            pixels: Pixels = simplejpeg.decode_jpeg(self._head + data[2:], "RGB", fastdct=False, fastupsample=False)
        except ValueError:
            return None
        return pixels if pixels.shape == (self.tile[1], self.tile[0], 3) else None


def jpeg_tiles(
    path: Path, levels: Sequence[Level], background: tuple[int, int, int], remedy: str
) -> dict[int, JpegTiles]:
    """The levels that consist of JPEG tiles in a plain grid, by number.

    Args:
        path: a TIFF file.
        levels: by OpenSlide.
        background: colour beyond the levels' edges.
        remedy: for an error if tifffile is not installed.
    """
    library: Any = need("tifffile", remedy)
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its warnings name no file
    found: dict[int, JpegTiles] = {}
    numbers = {(level.width, level.height): number for number, level in reversed(list(enumerate(levels)))}
    try:
        with library.TiffFile(path) as file:
            for page in file.pages:
                number = numbers.get((page.imagewidth, page.imagelength), -1)
                if number >= 0 and number not in found and _has_jpeg_tiles(page):
                    found[number] = JpegTiles(path, page, background)
    except Exception as error:  # noqa: BLE001  # by anything, on files that OpenSlide reads all the same
        logger.debug("%s: its tiles are read by OpenSlide, tifffile fails: %r", path, error)
    return found


def _has_jpeg_tiles(page: Any) -> bool:
    """True for a page of 8-bit RGB or YCbCr pixels in JPEG tiles."""
    colour = page.photometric in (_RGB, _YCBCR) and page.samplesperpixel == 3 and page.planarconfig == 1
    return bool(page.is_tiled and page.compression == _JPEG and page.bitspersample == 8 and colour)
