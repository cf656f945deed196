"""Grid of tiles over a slide at a given resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.slides.area import area_mean
from ca2cl.slides.readers.base import Level, Pixels, SlideError, SlideReader

COARSER = 1.05
"""A slide whose level 0 is coarser than ``mpp`` by up to this factor is enlarged; others are refused."""
_ROUNDING = 1e-6
_MOST_PIXELS = 4e6
"""Read at a time: a region of a slide without a coarse level may have gigabytes."""


@dataclass(frozen=True)
class Grid:
    """Tiles of a slide, in rows from its top left corner."""

    tile: int
    """Side in pixels."""
    stride: int
    """Pixels from a tile to the next one."""
    level: int
    """Level that is read: the coarsest one that is at least as fine as the tiles."""
    scale: float
    """Pixels of that level to a pixel of a tile."""
    downsample: float
    """Level-0 pixels to a pixel of that level."""
    columns: int
    rows: int

    def __len__(self) -> int:
        return self.columns * self.rows

    def corners(self) -> npt.NDArray[np.int64]:
        """Column and row of every tile, (N, 2), row by row."""
        return np.stack(np.meshgrid(np.arange(self.columns), np.arange(self.rows)), axis=-1).reshape(-1, 2)

    def boxes(self, corners_N2: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """``x0, y0, x1, y1`` of these tiles in level-0 pixels, (N, 4)."""
        start = corners_N2 * (self.stride * self.scale * self.downsample)
        return np.concatenate([start, start + self.tile * self.scale * self.downsample], axis=1)

    def read(self, slide: SlideReader, column: int, row: int) -> Pixels:
        """Pixels (tile, tile, 3) of one tile, white beyond the slide's edge.

        Raises:
            SlideError: it does not decode.
        """
        return read_scaled(slide, self.level, self.scale, column * self.stride, row * self.stride, self.tile, self.tile)


def read_scaled(slide: SlideReader, level: int, scale: float, x: int, y: int, width: int, height: int) -> Pixels:
    """A region of a slide by area averaging, (height, width, 3).

    Args:
        slide: open.
        level: which is read.
        scale: pixels of that level to a pixel of the result.
        x, y, width, height: region in pixels of the result.
    """
    if scale == 1.0:
        return slide.read(level, x, y, width, height)
    step = max(int(_MOST_PIXELS / (width * scale * scale)), 1)
    bands = [
        _read_band(slide, level, scale, x, top, width, min(step, y + height - top))
        for top in range(y, y + height, step)
    ]
    return bands[0] if len(bands) == 1 else np.concatenate(bands)


def _read_band(slide: SlideReader, level: int, scale: float, x: int, y: int, width: int, height: int) -> Pixels:
    left, top = x * scale, y * scale
    first = math.floor(left + _ROUNDING), math.floor(top + _ROUNDING)
    last = math.ceil(left + width * scale - _ROUNDING), math.ceil(top + height * scale - _ROUNDING)
    pixels = slide.read(level, *first, last[0] - first[0], last[1] - first[1])
    return area_mean(pixels, left - first[0], top - first[1], scale, width, height)


def choose_level(levels: Sequence[Level], slide_mpp: float, mpp: float) -> tuple[int, float]:
    """The coarsest level that is at least as fine as ``mpp``, and its pixels to a pixel of ``mpp``.

    Level 0 serves where it is coarser by up to ``COARSER``.

    Raises:
        SlideError: it is coarser than that.
    """
    scales = [mpp / (slide_mpp * level.downsample) for level in levels]
    fine = [number for number, scale in enumerate(scales) if scale >= 1 - _ROUNDING]
    if not fine and scales[0] < 1 / COARSER:
        raise SlideError(
            f"its {slide_mpp:g} micrometres a pixel are coarser than --mpp {mpp:g}; give --mpp {slide_mpp:g} or more"
        )
    chosen = max(fine, key=lambda number: levels[number].downsample) if fine else 0
    scale = scales[chosen]
    return chosen, 1.0 if abs(scale - 1) < _ROUNDING else scale


def make_grid(levels: Sequence[Level], slide_mpp: float, mpp: float, *, tile: int, overlap: int, pad: bool) -> Grid:
    """The grid of tiles of ``mpp`` micrometres a pixel.

    Args:
        levels: of the slide.
        slide_mpp: micrometres a pixel of level 0.
        mpp: micrometres a pixel of the tiles.
        tile: side in pixels.
        overlap: pixels that neighbours share.
        pad: take tiles that reach beyond the right and lower edge.

    Raises:
        SlideError: the slide is coarser than ``mpp``, or smaller than one tile.
    """
    chosen, scale = choose_level(levels, slide_mpp, mpp)
    level, stride = levels[chosen], tile - overlap
    counts = []
    for side in (level.width, level.height):
        length = side / scale + _ROUNDING
        counts.append(
            max(math.ceil((length - 2 * _ROUNDING - overlap) / stride), 1)
            if pad
            else math.floor((length - tile) / stride) + 1
            if length >= tile
            else 0
        )
    columns, rows = counts
    if columns < 1 or rows < 1:
        raise SlideError(
            f"{level.width / scale:.0f} x {level.height / scale:.0f} pixels at --mpp {mpp:g}, which is less than a "
            f"tile of {tile}; use --edge pad, or a smaller --tile or --mpp"
        )
    return Grid(tile, stride, chosen, scale, level.downsample, columns, rows)
