"""OME-TIFF and other TIFF files by tifffile, where OpenSlide refuses them."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.optional import need
from ca2cl.slides.readers.base import (
    WHITE,
    Level,
    Pixels,
    SlideError,
    one_line,
    plausible_mpp,
    sampled_digest,
    square_mpp,
)

_REMEDY = 'pip install "ca2cl[slides]"'
_MICROMETRES = {1: None, 2: 25400.0, 3: 10000.0}
"""To a unit of TIFF's ResolutionUnit: none, inch, centimetre."""


class TiffReader:
    """The first image of a TIFF file, with its pyramid.

    Raises:
        SlideError: not a TIFF, or not 8-bit RGB.
    """

    def __init__(self, path: Path) -> None:
        library: Any = need("tifffile", _REMEDY)
        zarr: Any = need("zarr", _REMEDY)
        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # its warnings name no file; what matters is an error
        try:
            self._file = library.TiffFile(path)
            series = self._file.series[0]
            self._channels_first = series.axes.endswith("SYX") or series.axes.endswith("CYX")
            shape = tuple(size for size in series.shape if size != 1)
            if series.dtype != np.uint8 or len(shape) != 3 or shape[0 if self._channels_first else 2] != 3:
                raise SlideError(f"{path}: {series.dtype} {series.axes} {series.shape}; only 8-bit RGB slides are read")
            self._levels = [zarr.open(series.aszarr(level=number), mode="r") for number in range(len(series.levels))]
        except SlideError:
            raise
        except Exception as error:  # noqa: BLE001 - tifffile, its codecs and zarr have errors of many kinds
            raise SlideError(f"{path}: tifffile cannot open it ({one_line(error)})") from None
        self._path = path
        sizes = [self._size(array.shape) for array in self._levels]
        self.levels = tuple(Level(width, height, sizes[0][0] / width) for width, height in sizes)
        self.mpp, self.hint = square_mpp(_mpp(self._file, "X"), _mpp(self._file, "Y"))
        self.bounds = 0, 0, *sizes[0]
        self.vendor = "ome-tiff" if self._file.is_ome else "tiff"
        self.digest = sampled_digest(path)

    def _size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        height, width = shape[-2:] if self._channels_first else shape[-3:-1]
        return width, height

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """As ``SlideReader.read``."""
        here = self.levels[level]
        out = np.full((height, width, 3), WHITE, np.uint8)
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, here.width), min(y + height, here.height)
        if left >= right or top >= bottom:
            return out
        array = self._levels[level]
        ahead: tuple[Any, ...] = (0,) * (array.ndim - 3)
        inside = slice(top, bottom), slice(left, right)
        try:
            if self._channels_first:
                found = np.moveaxis(array[ahead + (slice(None), *inside)], 0, -1)
            else:
                found = array[ahead + (*inside, slice(None))]
        except Exception as error:  # noqa: BLE001 - as above
            raise SlideError(f"{self._path}: level {level} does not decode ({one_line(error)})") from None
        out[top - y : bottom - y, left - x : right - x] = found
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _mpp(file: Any, axis: str) -> float | None:
    """Micrometres a pixel along ``X`` or ``Y``; None if they are not stated."""
    if file.is_ome and (found := re.search(rf'PhysicalSize{axis}="([^"]+)"', file.ome_metadata or "")):
        unit = re.search(rf'PhysicalSize{axis}Unit="([^"]+)"', file.ome_metadata)
        factor = {"nm": 1e-3, "mm": 1e3, "cm": 1e4}.get(unit.group(1), 1.0) if unit else 1.0
        with suppress(ValueError):
            return plausible_mpp(float(found.group(1)) * factor)
        return None
    tags = file.pages[0].tags
    unit, resolution = tags.get("ResolutionUnit"), tags.get(f"{axis}Resolution")
    micrometres = _MICROMETRES.get(int(unit.value)) if unit is not None else None
    if micrometres is None or resolution is None or not resolution.value[0]:
        return None
    over, under = resolution.value
    return plausible_mpp(micrometres * under / over)
