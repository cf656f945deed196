"""Slides by OpenSlide.

SVS, NDPI, MRXS, SCN, BIF, VMS, Philips and generic TIFF, DICOM.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.optional import need
from ca2cl.slides.readers.base import (
    Level,
    Pixels,
    SlideError,
    one_line,
    plausible_mpp,
    sampled_digest,
    square_mpp,
)
from ca2cl.slides.readers.jpeg import JpegTiles, jpeg_tiles

_PLAIN_GRIDS = {"aperio", "generic-tiff"}
"""Vendors whose levels are TIFF pages, tile beside tile."""
_REMEDY = 'pip install "ca2cl[slides]"'


class OpenSlideReader:
    """A slide that OpenSlide opens.

    Raises:
        SlideError: it does not.
    """

    def __init__(self, path: Path) -> None:
        library: Any = need("openslide", _REMEDY)
        self._error = library.OpenSlideError
        try:
            self._slide = library.OpenSlide(str(path))
        except (library.OpenSlideError, OSError) as error:
            raise SlideError(f"{path}: OpenSlide cannot open it ({one_line(error)})") from None
        self._path = path
        properties = self._slide.properties
        self.levels = tuple(
            Level(width, height, float(downsample))
            for (width, height), downsample in zip(
                self._slide.level_dimensions, self._slide.level_downsamples, strict=True
            )
        )
        across = plausible_mpp(properties.get("openslide.mpp-x"))
        self.mpp, self.hint = square_mpp(across, plausible_mpp(properties.get("openslide.mpp-y")))
        if not self.hint and (power := plausible_mpp(properties.get("openslide.objective-power"))):
            self.hint = f"objective {power:g}x"
        self.bounds = _bounds(properties, self.levels[0])
        self.vendor = str(properties.get("openslide.vendor", "unknown"))
        quick = properties.get("openslide.quickhash-1")
        self.digest = f"quickhash-1:{quick}" if quick else sampled_digest(path)
        self.is_ome = "<OME " in properties.get("tiff.ImageDescription", "")
        """True for an OME-TIFF, of which OpenSlide knows neither pyramid nor resolution."""
        self._background = _colour(properties.get("openslide.background-color", "FFFFFF"))
        self._tiles: dict[int, JpegTiles] | None = None

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As ``SlideReader.read``."""
        tiles = self._tiles_of(level)
        pixels = tiles.read(x, y, width, height) if tiles is not None else None
        return pixels if pixels is not None else self._read(level, x, y, width, height)

    def _tiles_of(self, level: int) -> JpegTiles | None:
        if self._tiles is None:
            self._tiles = self._jpeg_tiles()
        return self._tiles.get(level)

    def _jpeg_tiles(self) -> dict[int, JpegTiles]:
        """Levels whose tiles need not be read by OpenSlide: it neither moves nor interpolates them, and a tile that is
        decoded without it is the same."""
        if self.vendor not in _PLAIN_GRIDS:
            return {}
        found = {}
        for number, tiles in jpeg_tiles(self._path, self.levels, self._background, _REMEDY).items():
            whole = self.levels[number].downsample == round(self.levels[number].downsample)
            corner = tiles.whole_tile() if whole else None
            direct = tiles.read(*corner, *tiles.tile) if corner is not None else None
            if corner and direct is not None and (direct == self._read(number, *corner, *tiles.tile)).all():
                found[number] = tiles
            else:
                tiles.close()
        return found

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        downsample = self.levels[level].downsample
        corner = (round(x * downsample), round(y * downsample))
        try:
            region = self._slide.read_region(corner, level, (width, height))
        except self._error as error:
            raise SlideError(f"{self._path}: level {level} does not decode ({one_line(error)})") from None
        rgb: Pixels = np.array(region.convert("RGB"))
        alpha = region.getchannel("A")
        if alpha.getextrema()[0] == 0:  # not scanned, or beyond the edge
            rgb[np.asarray(alpha) == 0] = self._background
        return rgb

    def close(self) -> None:
        """Close the file."""
        self._slide.close()
        for tiles in (self._tiles or {}).values():
            tiles.close()


def _bounds(properties: Mapping[str, str], whole: Level) -> tuple[int, int, int, int]:
    """Of the scanned region, where the file states one; the others lie in an empty canvas."""
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if not all(name in properties for name in names):
        return 0, 0, whole.width, whole.height
    x, y, width, height = (int(properties[name]) for name in names)
    return x, y, x + width, y + height


def _colour(text: str) -> tuple[int, int, int]:
    """RGB of six hexadecimal digits."""
    red, green, blue = bytes.fromhex(text)
    return red, green, blue
