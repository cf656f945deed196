"""Grid of tiles over a slide at a given resolution."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.slides.area import area_mean
from ca2cl.slides.readers.base import Level, Pixels, RegionReader, SlideError
from ca2cl.slides.readers.block import Block

COARSER = 1.05
"""A slide whose level 0 is coarser than ``mpp`` by up to this factor is enlarged; others are refused."""
_ROUNDING = 1e-6
_MOST_PIXELS = 4e6
"""Read at a time: a region of a slide without a coarse level may have gigabytes."""
_SQUARE = 16
"""Tiles along the side of the squares by which a slide is cut."""
_BLOCK_PIXELS = 2048
"""Side of the blocks that are read at once."""


@dataclass(frozen=True)
class Grid:
    """Tiles of a slide, numbered row by row from its top left corner."""

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

    def corners(self, numbers_N: npt.NDArray[np.int64] | None = None) -> npt.NDArray[np.int64]:
        """Column and row of tiles, (N, 2); of all of them without ``numbers_N``."""
        rows_N, columns_N = np.divmod(np.arange(len(self)) if numbers_N is None else numbers_N, self.columns)
        return np.stack([columns_N, rows_N], axis=-1)

    def by_squares(self, numbers_N: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """These tiles square by square: consecutive ones share most of the blocks that a file is compressed in."""
        square_N2 = self.corners(numbers_N) // _SQUARE
        return numbers_N[np.lexsort((numbers_N, square_N2[:, 0], square_N2[:, 1]))]

    def boxes(self, corners_N2: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """``x0, y0, x1, y1`` of these tiles in level-0 pixels, (N, 4)."""
        start = corners_N2 * (self.stride * self.scale * self.downsample)
        return np.concatenate([start, start + self.tile * self.scale * self.downsample], axis=1)

    def read(self, slide: RegionReader, column: int, row: int) -> Pixels:
        """Pixels (tile, tile, 3) of one tile, white beyond the slide's edge.

        Raises:
            SlideError: it does not decode.
        """
        return read_scaled(slide, self.level, self.scale, column * self.stride, row * self.stride, self.tile, self.tile)

    def read_tiles(self, slide: RegionReader, numbers_N: npt.NDArray[np.int64]) -> Iterator[tuple[int, Pixels]]:
        """Position in ``numbers_N`` and pixels of each tile, in any order; the pixels are those of ``read``.

        Neighbours are read at once: a library's call for each tile costs a third more than that for 16 of them.

        Raises:
            SlideError: a tile does not decode.
        """
        corners_N2 = self.corners(numbers_N)
        places_N2 = corners_N2 // self._block_tiles()
        order_N = np.lexsort((numbers_N, places_N2[:, 0], places_N2[:, 1]))
        last_N = np.flatnonzero(np.diff(places_N2[order_N], axis=0).any(axis=1))
        for block in np.split(order_N, last_N + 1):
            source = self._block(slide, corners_N2[block])
            for place in block.tolist():
                column, row = corners_N2[place].tolist()
                yield place, self.read(source, column, row)

    def _block_tiles(self) -> int:
        """Tiles along the side of a block, a power of two."""
        most = _BLOCK_PIXELS / (self.stride * self.scale)
        return min(1 << max(int(math.log2(most)), 0), _SQUARE) if most > 1 else 1

    def _block(self, slide: RegionReader, corners_N2: npt.NDArray[np.int64]) -> RegionReader:
        """The pixels around these tiles, or the slide itself where reading them at once is no gain."""
        first, last = corners_N2.min(axis=0), corners_N2.max(axis=0)
        dense = 2 * len(corners_N2) > np.prod(last - first + 1)
        # OpenSlide interpolates at positions between the pixels of a level, which other corners have otherwise.
        if len(corners_N2) == 1 or not dense or self.downsample != round(self.downsample):
            return slide
        left, top = ((first * self.stride) * self.scale + _ROUNDING).astype(int).tolist()
        ends = np.ceil((last * self.stride) * self.scale + self.tile * self.scale - _ROUNDING)
        right, bottom = ends.astype(int).tolist()
        return Block(slide, self.level, left, top, right - left, bottom - top)


def read_scaled(slide: RegionReader, level: int, scale: float, x: int, y: int, width: int, height: int) -> Pixels:
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


def _read_band(slide: RegionReader, level: int, scale: float, x: int, y: int, width: int, height: int) -> Pixels:
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
