"""Slides by OpenSlide.

SVS, NDPI, MRXS, SCN, BIF, VMS, Philips and generic TIFF, DICOM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.optional import need
from ca2cl.slides.readers.base import Level, Pixels, SlideError, one_line, plausible_mpp, sampled_digest

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
        down = plausible_mpp(properties.get("openslide.mpp-y"))
        self.mpp = across if across is not None and down is not None and abs(across - down) <= 0.02 * across else None
        self.magnification = plausible_mpp(properties.get("openslide.objective-power"))
        self.vendor = str(properties.get("openslide.vendor", "unknown"))
        quick = properties.get("openslide.quickhash-1")
        self.digest = f"quickhash-1:{quick}" if quick else sampled_digest(path)
        self.is_ome = "<OME " in properties.get("tiff.ImageDescription", "")
        """True for an OME-TIFF, of which OpenSlide knows neither pyramid nor resolution."""
        self._background = _colour(properties.get("openslide.background-color", "FFFFFF"))

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As ``SlideReader.read``."""
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


def _colour(text: str) -> tuple[int, int, int]:
    """RGB of six hexadecimal digits."""
    red, green, blue = bytes.fromhex(text)
    return red, green, blue
