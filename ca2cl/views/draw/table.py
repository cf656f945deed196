"""Table of draws: a float32 row for each view of each tile.

Drawn on the host (``paper``, ``crop``), copied to the device once, and all that a renderer (``cpu``, ``triton``) needs
beside the tiles. Coordinates are torch's: x to the right and y down, -1 and 1 the outer edges of an image, so that a
map knows neither the tile's size nor the view's. Maps run backwards, from the view to the tile. Pixel values are 8-bit
levels, 0 to 255.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

View = Literal["strong", "weak"]

ROW = np.dtype(
    [
        # where a pixel of the view is read, first to last
        ("affine", "<f4", 6),  # x' = a x + b y + c, y' = d x + e y + f
        ("border", "<f4"),  # 1: what the first map reads outside of the tile is black in the end
        ("bend", "<f4"),  # NO_BEND, OPTICAL, GRID
        ("optical", "<f4"),  # k of r -> r (1 + k r^2 + k r^4), r in sides of the image from its centre
        ("grid_x", "<f4", 5),  # factors that equal columns are stretched by, from the left
        ("grid_y", "<f4", 5),  # the same of rows, from the top
        ("turn", "<f4", 6),  # one more affine map
        ("reduce", "<f4"),  # k: the tile is averaged over k x k pixels before it is read
        # colour, before neighbours
        ("adjust", "<f4", 3),  # scale, offset, highest: v -> clip(scale v + offset, 0, highest)
        ("stained", "<f4"),  # 1: the stains change
        ("stain", "<f4", 12),  # d' = M d + o of the optical densities -log(v / 255): M by rows, then o
        ("coloured", "<f4"),  # 1: the colours change
        ("colour", "<f4", 10),  # v' = M v + o g, g the mean grey of the view: M by rows, then o
        # neighbours
        ("blur", "<f4"),  # NO_BLUR, GAUSSIAN, MOTION, MEDIAN, NOISE
        ("radius", "<f4"),  # of the Gaussian kernel or the median's window, in pixels
        ("sigma", "<f4"),  # of the Gaussian kernel, in pixels
        ("line", "<f4", 4),  # the motion's ends from the pixel, y, x, y, x: a line of pixels
        ("deviation", "<f4"),  # of the noise, in levels
        ("noise", "<f4"),  # which noise, below 2^24
        # colour, after neighbours
        ("clip", "<f4"),  # CLAHE: most pixels in a bin of a cell's histogram; 0: none
        ("shifted", "<f4"),  # 1: hue, saturation and value shift
        ("hsv", "<f4", 3),  # by sixths of the circle, and by shares of 1
        ("hole", "<f4", 3),  # top, left and side of the black square, in pixels
    ]
)
NO_BEND, OPTICAL, GRID = 0, 1, 2
NO_BLUR, GAUSSIAN, MOTION, MEDIAN, NOISE = 0, 1, 2, 3, 4

Table = npt.NDArray[np.void]
"""(V, B) of ROW: V views of B tiles."""


class Passes(NamedTuple):
    """What some row of a view may ask for beside the reading: the recipe knows, whatever was drawn."""

    stain: bool
    """``stained`` and ``coloured``."""
    blur: bool
    clahe: bool


def plain(views: int, tiles: int) -> Table:
    """A table of views that are the tiles, resized to the view."""
    table = np.zeros((views, tiles), ROW)
    table["affine"] = table["turn"] = (1, 0, 0, 0, 1, 0)
    table["grid_x"] = table["grid_y"] = table["reduce"] = 1
    table["adjust"] = (1, 0, 255)
    return table


def column(name: str) -> int:
    """Number of a field's first float32 in a row."""
    assert ROW.fields is not None
    return ROW.fields[name][1] // 4
