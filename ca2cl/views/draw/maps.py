"""Affine maps of coordinates, as six numbers.

The numbers a, b, c, d, e, f are those of x' = a x + b y + c and y' = d x + e y + f.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
Affine = Floats
"""Maps (..., 6), from the view to the tile, in the coordinates of ``table``."""


def affine(a: object, b: object, c: object, d: object, e: object, f: object) -> Affine:
    """The maps of six numbers or arrays of them."""
    return np.stack(np.broadcast_arrays(a, b, c, d, e, f), -1).astype(np.float64)  # type: ignore[arg-type]


def then(first: Affine, second: Affine) -> Affine:
    """The map that applies ``first`` and to its result ``second``."""
    a, b, c, d, e, f = np.moveaxis(first, -1, 0)
    p, q, r, s, t, u = np.moveaxis(second, -1, 0)
    return affine(p * a + q * d, p * b + q * e, p * c + q * f + r, s * a + t * d, s * b + t * e, s * c + t * f + u)


def inverse(of: Affine, least: float) -> Affine:
    """The inverse map; an area that shrinks to less than the share ``least`` counts as ``least``."""
    a, b, c, d, e, f = np.moveaxis(of, -1, 0)
    area = a * e - b * d
    area = np.copysign(np.maximum(np.abs(area), least), area)
    return affine(e / area, -b / area, (b * f - c * e) / area, -d / area, a / area, (c * d - a * f) / area)


def dihedral(transpose: Flags, vertical: Flags, horizontal: Flags) -> Affine:
    """Transpose, then flip top to bottom, then left to right, where the flags say so."""
    x, y = 1.0 - 2.0 * horizontal, 1.0 - 2.0 * vertical
    return affine(~transpose * x, transpose * y, 0.0, transpose * x, ~transpose * y, 0.0)


def shift_scale_rotate(shift_x: Floats, shift_y: Floats, scale: Floats, degrees: Floats) -> Affine:
    """The inverse of: turn counter-clockwise about the centre, scale, shift right and down by shares of the side."""
    cos, sin = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    return then(affine(1.0, 0.0, -2.0 * shift_x, 0.0, 1.0, -2.0 * shift_y), affine(cos, -sin, 0.0, sin, cos, 0.0))


def window(left: Floats, top: Floats, width: Floats, height: Floats) -> Affine:
    """A view that covers a window of the tile; all four in shares of the tile's side."""
    return affine(width, 0.0, 2.0 * left + width - 1.0, 0.0, height, 2.0 * top + height - 1.0)


def three_points(moves: Floats) -> Affine:
    """The map that moves three corners of the middle square (of 2/3 of the side) by ``moves``.

    Args:
        moves: (..., 3, 2), in x and y, of the corners bottom right, top right and top left.
    """
    right_low, right_high, left_high = (moves[..., i, :] for i in range(3))
    by_x, by_y = (right_high - left_high) * 0.75, (right_low - right_high) * 0.75
    shift = (right_low + left_high) * 0.5
    return affine(1.0 + by_x[..., 0], by_y[..., 0], shift[..., 0], by_x[..., 1], 1.0 + by_y[..., 1], shift[..., 1])
