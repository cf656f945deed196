"""Region of a slide that is read at once."""

from __future__ import annotations

from ca2cl.slides.readers.base import Pixels, RegionReader


class Block:
    """Pixels of one region of a level.

    Raises:
        SlideError: it does not decode.
    """

    def __init__(self, slide: RegionReader, level: int, x: int, y: int, width: int, height: int) -> None:
        self._pixels = slide.read(level, x, y, width, height)
        self._level, self._x, self._y = level, x, y

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As ``SlideReader.read``, of a region that lies in the block; not to be written to."""
        found = self._pixels[y - self._y : y - self._y + height, x - self._x : x - self._x + width]
        assert level == self._level and min(x - self._x, y - self._y) >= 0 and found.shape[:2] == (height, width)
        return found
