"""One reading of the tile: geometry, brightness and contrast."""

from __future__ import annotations

from typing import Any

import numpy as np

from ca2cl.views.cpu.compiled import compiled
from ca2cl.views.draw import table as codes

f = np.float32
_OPTICAL, _GRID = codes.OPTICAL, codes.GRID


@compiled
def pack(tile: Any, k: int, packed: Any) -> None:
    """The tile averaged over k x k pixels, one word a pixel; the last row and column stand once more at the end."""
    height, width = tile.shape[0] // k, tile.shape[1] // k
    half, area = np.uint32(k * k // 2), np.uint32(k * k)
    for y in range(height):
        if k == 1:
            for x in range(width):
                packed[y, x] = np.uint32(tile[y, x, 0]) | np.uint32(tile[y, x, 1] << 8) | np.uint32(tile[y, x, 2] << 16)
        else:
            for x in range(width):
                word = np.uint32(0)
                for c in range(3):
                    total = half
                    for i in range(k):
                        for j in range(k):
                            total += np.uint32(tile[y * k + i, x * k + j, c])
                    word |= np.uint32(total // area) << np.uint32(8 * c)
                packed[y, x] = word
        packed[y, width] = packed[y, width - 1]
    packed[height, : width + 1] = packed[height - 1, : width + 1]


@compiled
def _coordinates(p: Any, row: int, size: int, xs: Any, ys: Any) -> None:
    """Where the pixels of a row of the view are read."""
    ny = f(2 * row + 1 - size) / f(size)
    a, b, d, e = p.affine[0], p.affine[1] * ny + p.affine[2], p.affine[3], p.affine[4] * ny + p.affine[5]
    step, first = f(2) / f(size), f(1 - size) / f(size)
    for i in range(size):
        nx = f(np.int32(i)) * step + first
        xs[i] = a * nx + b
        ys[i] = d * nx + e
    if p.bend == _OPTICAL:
        k = p.optical
        for i in range(size):
            r2 = (xs[i] * xs[i] + ys[i] * ys[i]) * f(0.25)
            factor = f(1) + k * (r2 + r2 * r2)
            xs[i] *= factor
            ys[i] *= factor
    elif p.bend == _GRID:
        for at, steps in ((xs, p.grid_x), (ys, p.grid_y)):
            s0, s1, s2, s3, s4 = steps[0], steps[1], steps[2], steps[3], steps[4]
            for i in range(size):
                t, w = at[i] + f(1), f(0.4)
                out = s0 * min(max(t, f(0)), w) + s1 * min(max(t - w, f(0)), w)
                out += s2 * min(max(t - f(0.8), f(0)), w) + s3 * min(max(t - f(1.2), f(0)), w)
                at[i] = out + s4 * min(max(t - f(1.6), f(0)), w) - f(1)
    a, b, c, d, e, g = p.turn[0], p.turn[1], p.turn[2], p.turn[3], p.turn[4], p.turn[5]
    for i in range(size):
        x, y = xs[i], ys[i]
        xs[i] = a * x + b * y + c
        ys[i] = d * x + e * y + g


@compiled
def _to_pixel(at: Any, side: int) -> Any:
    """The pixel position of a coordinate, reflected at the edges."""
    n, two = f(side), f(2 * side)
    t = abs((at + f(1)) * (f(0.5) * n))
    t -= two * np.floor(t * (f(1) / two))
    return min(max(n - abs(t - n) - f(0.5), f(0)), n - f(1))


@compiled
def read(packed: Any, height: int, width: int, p: Any, planes: Any) -> None:
    """Geometry, brightness and contrast: one bilinear reading of the tile."""
    size, stride = planes.shape[1], packed.shape[1]
    words = packed.reshape(-1)
    xs, ys = np.empty(size, np.float32), np.empty(size, np.float32)
    place, corners = np.empty(size, np.uint32), np.empty((4, size), np.uint32)
    scale, offset, highest = p.adjust[0], p.adjust[1], p.adjust[2]
    for row in range(size):
        _coordinates(p, row, size, xs, ys)
        for i in range(size):
            x, y = _to_pixel(xs[i], width), _to_pixel(ys[i], height)
            left, top = np.int32(x), np.int32(y)
            xs[i], ys[i] = x - f(left), y - f(top)
            place[i] = np.uint32(np.int32(top * np.int32(stride)) + left)
        for i in range(size):
            at = place[i]
            corners[0, i] = words[at]
            corners[1, i] = words[at + np.uint32(1)]
            corners[2, i] = words[at + np.uint32(stride)]
            corners[3, i] = words[at + np.uint32(stride + 1)]
        for c in range(3):
            shift = np.uint32(8 * c)
            for i in range(size):
                q = f(np.int32((corners[0, i] >> shift) & np.uint32(255)))
                r = f(np.int32((corners[1, i] >> shift) & np.uint32(255)))
                s = f(np.int32((corners[2, i] >> shift) & np.uint32(255)))
                t = f(np.int32((corners[3, i] >> shift) & np.uint32(255)))
                upper = q + (r - q) * xs[i]
                value = upper + (s + (t - s) * xs[i] - upper) * ys[i]
                value = min(max(value * scale + offset, f(0)), highest)
                planes[c, row, i] = np.uint8(np.int32(value + f(0.5)))
