# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# Triton reads annotations, too, and takes those of constants alone.
"""Common parts of the Triton kernels: read, finish and store pixels.

Images are uint8 (B, S, S, 3), ``table`` is float32 (B, columns) as in ``draw.table``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ca2cl.views.draw import table as t

AFFINE, BORDER, BEND = (tl.constexpr(t.column(name)) for name in ("affine", "border", "bend"))
LENS, GRID_X, GRID_Y = (tl.constexpr(t.column(name)) for name in ("optical", "grid_x", "grid_y"))
TURN, REDUCE, ADJUST = (tl.constexpr(t.column(name)) for name in ("turn", "reduce", "adjust"))
SHIFTED, HSV, HOLE = (tl.constexpr(t.column(name)) for name in ("shifted", "hsv", "hole"))
OPTICAL, GRID = tl.constexpr(t.OPTICAL), tl.constexpr(t.GRID)


@triton.jit
def to_level(value):
    """The nearest of 256 levels, a whole number as float32."""
    return tl.floor(tl.minimum(tl.maximum(value, 0.0), 255.0) + 0.5)


@triton.jit
def load(image, y, x, width, mask):
    at = image + (y * width + x) * 3
    r, g, b = tl.load(at, mask, 0), tl.load(at + 1, mask, 0), tl.load(at + 2, mask, 0)
    return r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)


@triton.jit
def _map(p, x, y):
    """Coordinates through the affine map at ``p``."""
    a, b, c = tl.load(p), tl.load(p + 1), tl.load(p + 2)
    d, e, f = tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
    return a * x + (b * y + c), d * x + (e * y + f)


@triton.jit
def through(p, r, g, b):
    """Colours through the 3 x 3 matrix at ``p``."""
    red = tl.load(p) * r + tl.load(p + 1) * g + tl.load(p + 2) * b
    green = tl.load(p + 3) * r + tl.load(p + 4) * g + tl.load(p + 5) * b
    return red, green, tl.load(p + 6) * r + tl.load(p + 7) * g + tl.load(p + 8) * b


@triton.jit
def _stretch(p, at):
    out = at * 0.0 - 1.0
    for cell in range(5):
        out += tl.load(p + cell) * tl.minimum(tl.maximum(at + 1.0 - cell * 0.4, 0.0), 0.4)
    return out


@triton.jit
def _to_pixel(at, side):
    """The pixel position of a coordinate, reflected at the edges."""
    n = side.to(tl.float32)
    place = tl.abs((at + 1.0) * (0.5 * n))
    place -= 2.0 * n * tl.floor(place / (2.0 * n))
    return tl.minimum(tl.maximum(n - tl.abs(place - n) - 0.5, 0.0), n - 1.0)


@triton.jit
def _block_mean(tile, y, x, k, width, mask):
    """The mean of k x k pixels of the tile."""
    r, g, b = load(tile, y * k, x * k, width, mask)
    if k > 1:
        for other in range(1, k * k):
            red, green, blue = load(tile, y * k + other // k, x * k + other % k, width, mask)
            r += red
            g += green
            b += blue
        share = 1.0 / (k * k * 1.0)
        r, g, b = to_level(r * share), to_level(g * share), to_level(b * share)
    return r, g, b


@triton.jit
def read_pixels(tile, p, y, x, height, width, size, mask):
    """Geometry, brightness and contrast: levels of the pixels (y, x) of a view."""
    k = tl.load(p + REDUCE).to(tl.int32)
    rows, columns = height // k, width // k
    nx, ny = (2 * x + 1 - size).to(tl.float32) / size, (2 * y + 1 - size).to(tl.float32) / size
    u, v = _map(p + AFFINE, nx, ny)
    bend = tl.load(p + BEND)
    if bend == OPTICAL:
        r2 = (u * u + v * v) * 0.25
        factor = 1.0 + tl.load(p + LENS) * (r2 + r2 * r2)
        u, v = u * factor, v * factor
    if bend == GRID:
        u, v = _stretch(p + GRID_X, u), _stretch(p + GRID_Y, v)
    u, v = _map(p + TURN, u, v)
    u, v = _to_pixel(u, columns), _to_pixel(v, rows)
    left, top = u.to(tl.int32), v.to(tl.int32)
    right, low = tl.minimum(left + 1, columns - 1), tl.minimum(top + 1, rows - 1)
    across, down = u - left.to(tl.float32), v - top.to(tl.float32)
    r0, g0, b0 = _block_mean(tile, top, left, k, width, mask)
    r1, g1, b1 = _block_mean(tile, top, right, k, width, mask)
    r2, g2, b2 = _block_mean(tile, low, left, k, width, mask)
    r3, g3, b3 = _block_mean(tile, low, right, k, width, mask)
    r = _adjusted(p, r0, r1, r2, r3, across, down)
    return r, _adjusted(p, g0, g1, g2, g3, across, down), _adjusted(p, b0, b1, b2, b3, across, down)


@triton.jit
def _adjusted(p, a, b, c, d, across, down):
    upper = a + (b - a) * across
    value = upper + (c + (d - c) * across - upper) * down
    value = tl.maximum(value * tl.load(p + ADJUST) + tl.load(p + ADJUST + 1), 0.0)
    return tl.floor(tl.minimum(value, tl.load(p + ADJUST + 2)) + 0.5)


@triton.jit
def finish_pixels(p, y, x, size, r, g, b):
    """Hue, saturation and value, the black frame and the hole, of levels."""
    r, g, b = r * (1.0 / 255.0), g * (1.0 / 255.0), b * (1.0 / 255.0)
    if tl.load(p + SHIFTED) > 0:
        high, low = tl.maximum(r, tl.maximum(g, b)), tl.minimum(r, tl.minimum(g, b))
        angle = ((g - low) + (b - low) + (high - r)) / tl.maximum(high - low, 1e-6)
        angle = tl.where(g >= b, angle, -angle) + tl.load(p + HSV)
        chroma = (high - low) / tl.maximum(high, 1e-6) + tl.load(p + HSV + 1)
        high = tl.minimum(tl.maximum(high + tl.load(p + HSV + 2), 0.0), 1.0)
        chroma = tl.minimum(tl.maximum(chroma, 0.0), 1.0) * high
        r = high - chroma * tl.minimum(tl.maximum(tl.abs(angle) - 1.0, 0.0), 1.0)
        g = high - chroma * tl.minimum(tl.maximum(tl.abs(tl.abs(angle + 1.0) - 3.0) - 1.0, 0.0), 1.0)
        b = high - chroma * tl.minimum(tl.maximum(tl.abs(tl.abs(angle - 1.0) - 3.0) - 1.0, 0.0), 1.0)
    if tl.load(p + BORDER) > 0:
        nx, ny = (2 * x + 1 - size).to(tl.float32) / size, (2 * y + 1 - size).to(tl.float32) / size
        u, v = _map(p + AFFINE, nx, ny)
        half = size * 0.5
        share = tl.minimum(tl.maximum(half + 0.5 - tl.abs(u) * half, 0.0), 1.0)
        share *= tl.minimum(tl.maximum(half + 0.5 - tl.abs(v) * half, 0.0), 1.0)
        r, g, b = r * share, g * share, b * share
    top, left, side = tl.load(p + HOLE), tl.load(p + HOLE + 1), tl.load(p + HOLE + 2)
    gone = (y >= top) & (y < top + side) & (x >= left) & (x < left + side)
    shown = tl.where(gone, 0.0, 255.0)
    return to_level(r * shown), to_level(g * shown), to_level(b * shown)


@triton.jit
def store(to, colours, at, mask, r, g, b):
    """Levels as the encoder takes them: through ``colours`` (3, 256) of the result's type."""
    to += at * 3
    tl.store(to, tl.load(colours + r.to(tl.int32)), mask)
    tl.store(to + 1, tl.load(colours + 256 + g.to(tl.int32)), mask)
    tl.store(to + 2, tl.load(colours + 512 + b.to(tl.int32)), mask)


@triton.jit
def store_levels(to, at, mask, r, g, b):
    to += at * 3
    tl.store(to, r.to(tl.uint8), mask)
    tl.store(to + 1, g.to(tl.uint8), mask)
    tl.store(to + 2, b.to(tl.uint8), mask)


@triton.jit
def place(size, BLOCK: tl.constexpr):
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(0).to(tl.int64), at, at // size, at % size, at < size * size


@triton.jit
def mirrored(at, size):
    return size - 1 - tl.abs(size - 1 - tl.abs(at))
