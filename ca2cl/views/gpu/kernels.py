# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# Triton reads annotations, too, and takes those of constants alone.
"""Triton kernels of the views.

A program makes a block of pixels of one view; nothing is decided on the host.

Images are uint8 (B, S, S, 3), ``table`` is float32 (B, columns) as in ``draw.table``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ca2cl.views.draw import table as t
from ca2cl.views.gpu.pixels import (
    finish_pixels,
    load,
    mirrored,
    place,
    read_pixels,
    store,
    store_levels,
    through,
    to_level,
)

COLUMNS = tl.constexpr(t.ROW.itemsize // 4)
STAINED, STAIN, COLOUR = (tl.constexpr(t.column(name)) for name in ("stained", "stain", "colour"))
BLUR, RADIUS, SIGMA, LINE = (tl.constexpr(t.column(name)) for name in ("blur", "radius", "sigma", "line"))
DEVIATION, NOISE_SEED, CLIP = (tl.constexpr(t.column(name)) for name in ("deviation", "noise", "clip"))
GAUSSIAN, MOTION, MEDIAN, NOISE = (tl.constexpr(code) for code in (t.GAUSSIAN, t.MOTION, t.MEDIAN, t.NOISE))
LINEAR_AT, LIGHTNESS_AT = tl.constexpr(768), tl.constexpr(1024)  # in the constants, after the colours
NOISE_SCALE = tl.constexpr((8 * (256 * 256 - 1) / 12) ** -0.5)


@triton.jit
def read_kernel(
    tiles, table, out, sums, height, width, size,
    BLOCK: tl.constexpr, STAINS: tl.constexpr,
):  # fmt: skip
    """``out`` = views as they are read; with STAINS their stains changed, and ``sums`` (B, blocks, 3) of channels."""
    row, at, y, x, mask = place(size, BLOCK)
    p = table + row * COLUMNS
    r, g, b = read_pixels(tiles + row * height * width * 3, p, y, x, height, width, size, mask)
    if STAINS:
        if tl.load(p + STAINED) > 0:
            dr, dg, db = (
                -tl.log(tl.maximum(r, 1.0) * (1.0 / 255.0)), -tl.log(tl.maximum(g, 1.0) * (1.0 / 255.0)),
                -tl.log(tl.maximum(b, 1.0) * (1.0 / 255.0)),
            )  # fmt: skip
            dr, dg, db = through(p + STAIN, dr, dg, db)
            r = to_level(255.0 * tl.exp(-tl.maximum(dr + tl.load(p + STAIN + 9), 0.0)))
            g = to_level(255.0 * tl.exp(-tl.maximum(dg + tl.load(p + STAIN + 10), 0.0)))
            b = to_level(255.0 * tl.exp(-tl.maximum(db + tl.load(p + STAIN + 11), 0.0)))
        to = sums + (row * tl.num_programs(1) + tl.program_id(1)) * 3
        tl.store(to, tl.sum(tl.where(mask, r, 0.0).to(tl.int32)))
        tl.store(to + 1, tl.sum(tl.where(mask, g, 0.0).to(tl.int32)))
        tl.store(to + 2, tl.sum(tl.where(mask, b, 0.0).to(tl.int32)))
    store_levels(out + row * size * size * 3, at, mask, r, g, b)


@triton.jit
def weak_kernel(tiles, table, colours, out, height, width, size, BLOCK: tl.constexpr):
    """``out`` = views without neighbours, read and finished."""
    row, at, y, x, mask = place(size, BLOCK)
    p = table + row * COLUMNS
    r, g, b = read_pixels(tiles + row * height * width * 3, p, y, x, height, width, size, mask)
    r, g, b = finish_pixels(p, y, x, size, r, g, b)
    store(out + row * size * size * 3, colours, at, mask, r, g, b)


@triton.jit
def _coloured(p, grey, r, g, b):
    red, green, blue = through(p + COLOUR, r, g, b)
    return to_level(red + grey), to_level(green + grey), to_level(blue + grey)


@triton.jit
def across_kernel(
    images, table, sums, out, size, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COLOURS: tl.constexpr,
):  # fmt: skip
    """``out`` = a Gaussian blur along the rows, where it was drawn; with COLOURS the colours are changed before."""
    row, at, y, x, mask = place(size, BLOCK)
    p, image = table + row * COLUMNS, images + row * size * size * 3
    grey = 0.0
    if COLOURS:
        block = tl.arange(0, BLOCKS)
        parts, there = sums + (row * blocks + block) * 3, block < blocks
        sum_r = tl.sum(tl.load(parts, there, 0)).to(tl.float32)
        sum_g = tl.sum(tl.load(parts + 1, there, 0)).to(tl.float32)
        sum_b = tl.sum(tl.load(parts + 2, there, 0)).to(tl.float32)
        grey = (0.299 * sum_r + 0.587 * sum_g + 0.114 * sum_b) / (size * size) * tl.load(p + COLOUR + 9)
    blurred = tl.load(p + BLUR) == GAUSSIAN
    radius, sigma = tl.where(blurred, tl.load(p + RADIUS).to(tl.int32), 0), tl.maximum(tl.load(p + SIGMA), 1e-3)
    red, green, blue, total = x * 0.0, x * 0.0, x * 0.0, 0.0
    for tap in range(-radius, radius + 1):
        part = tap * 1.0 / sigma
        weight = tl.exp(-0.5 * part * part)
        r, g, b = load(image, y, mirrored(x + tap, size), size, mask)
        if COLOURS:
            r, g, b = _coloured(p, grey, r, g, b)
        red += weight * r
        green += weight * g
        blue += weight * b
        total += weight
    red, green, blue = to_level(red / total), to_level(green / total), to_level(blue / total)
    store_levels(out + row * size * size * 3, at, mask, red, green, blue)


@triton.jit
def _median(image, y, x, radius, size, mask):
    """The largest levels that at most half of a window lies below, by bits."""
    side = 2 * radius + 1
    half = side * side // 2
    r, g, b = x * 0, x * 0, x * 0
    bit = 128
    for _ in range(8):
        under_r, under_g, under_b = x * 0, x * 0, x * 0
        for tap in range(side * side):
            yy = tl.minimum(tl.maximum(y + tap // side - radius, 0), size - 1)
            xx = tl.minimum(tl.maximum(x + tap % side - radius, 0), size - 1)
            red, green, blue = load(image, yy, xx, size, mask)
            under_r += (red < r + bit).to(tl.int32)
            under_g += (green < g + bit).to(tl.int32)
            under_b += (blue < b + bit).to(tl.int32)
        r += tl.where(under_r <= half, bit, 0)
        g += tl.where(under_g <= half, bit, 0)
        b += tl.where(under_b <= half, bit, 0)
        bit = bit // 2
    return r.to(tl.float32), g.to(tl.float32), b.to(tl.float32)


@triton.jit
def _mix(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _noisy(p, value, number):
    """A level with Gaussian noise; ``number`` of the pixel, channel by channel."""
    seed = _mix(tl.load(p + NOISE_SEED).to(tl.uint32))
    one, two = _mix(seed + number.to(tl.uint32) * 2), _mix(seed + number.to(tl.uint32) * 2 + 1)
    sums = (one & 0x00FF00FF) + ((one >> 8) & 0x00FF00FF) + (two & 0x00FF00FF) + ((two >> 8) & 0x00FF00FF)
    normal = ((sums & 0xFFFF) + (sums >> 16)).to(tl.float32) - 1020.0
    return to_level(value + normal * (tl.load(p + DEVIATION) * NOISE_SCALE))


@triton.jit
def near_kernel(
    images, table, colours, out, size,
    BLOCK: tl.constexpr, GAUSSIAN_ONLY: tl.constexpr,
):  # fmt: skip
    """``out`` = the other half of a Gaussian blur, motion, median or noise; with GAUSSIAN_ONLY finished, too."""
    row, at, y, x, mask = place(size, BLOCK)
    p, image, to = table + row * COLUMNS, images + row * size * size * 3, out + row * size * size * 3
    kind, radius = tl.load(p + BLUR), tl.load(p + RADIUS).to(tl.int32)
    r, g, b = load(image, y, x, size, mask)
    if kind == GAUSSIAN:
        sigma, total = tl.maximum(tl.load(p + SIGMA), 1e-3), 0.0
        red, green, blue = x * 0.0, x * 0.0, x * 0.0
        for tap in range(-radius, radius + 1):
            part = tap * 1.0 / sigma
            weight = tl.exp(-0.5 * part * part)
            r, g, b = load(image, mirrored(y + tap, size), x, size, mask)
            red += weight * r
            green += weight * g
            blue += weight * b
            total += weight
        r, g, b = to_level(red / total), to_level(green / total), to_level(blue / total)
    if GAUSSIAN_ONLY:
        r, g, b = finish_pixels(p, y, x, size, r, g, b)
        store(to, colours, at, mask, r, g, b)
    else:
        if kind == MOTION:
            first_y, first_x = tl.load(p + LINE), tl.load(p + LINE + 1)
            dy, dx = tl.load(p + LINE + 2) - first_y, tl.load(p + LINE + 3) - first_x
            steps = tl.maximum(tl.abs(dy), tl.abs(dx))
            red, green, blue = x * 0.0, x * 0.0, x * 0.0
            for tap in range(steps.to(tl.int32) + 1):
                part = tap * 1.0 / steps
                yy = mirrored(y + tl.floor(first_y + dy * part + 0.5).to(tl.int32), size)
                xx = mirrored(x + tl.floor(first_x + dx * part + 0.5).to(tl.int32), size)
                r, g, b = load(image, yy, xx, size, mask)
                red += r
                green += g
                blue += b
            share = 1.0 / (steps + 1.0)
            r, g, b = to_level(red * share), to_level(green * share), to_level(blue * share)
        if kind == MEDIAN:
            r, g, b = _median(image, y, x, radius, size, mask)
        if kind == NOISE:
            r, g, b = _noisy(p, r, at), _noisy(p, g, size * size + at), _noisy(p, b, 2 * size * size + at)
        store_levels(to, at, mask, r, g, b)


@triton.jit
def _linear(constants, level):
    """Linear light of a level of sRGB, in 0 ... 65,535."""
    return tl.load(constants + LINEAR_AT + level.to(tl.int32)).to(tl.int32)


@triton.jit
def _root(v):
    """f of the definition of L*a*b*: a cube root, straight near black."""
    power = tl.exp2(tl.log2(tl.maximum(v, 1e-6)) * (1.0 / 3.0))
    return tl.where(v <= 216.0 / 24389.0, v * (24389.0 / 27.0 / 116.0) + 16.0 / 116.0, power)


@triton.jit
def _cube(v):
    return tl.where(v <= 6.0 / 29.0, (v - 16.0 / 116.0) * (27.0 * 116.0 / 24389.0), v * v * v)


@triton.jit
def _gamma(v):
    """The level of linear light."""
    v = tl.minimum(tl.maximum(v, 0.0), 1.0)
    power = 1.055 * tl.exp2(tl.log2(tl.maximum(v, 1e-6)) * (1.0 / 2.4)) - 0.055
    return to_level(255.0 * tl.where(v <= 0.0031308, v * 12.92, power))


@triton.jit
def _lightness(constants, r, g, b):
    """L of linear light as one of 256 levels."""
    return tl.load(constants + LIGHTNESS_AT + ((r * 871 + g * 2929 + b * 296) >> 16)).to(tl.int32)


@triton.jit
def tables_kernel(images, table, constants, out, size, side, BLOCK: tl.constexpr):
    """``out`` (B, 8, 8, 256) = CLAHE's tables of the cells of ``side`` pixels, where it was drawn."""
    row, cell = tl.program_id(0).to(tl.int64), tl.program_id(1)
    image, clip = images + row * size * size * 3, tl.load(table + row * COLUMNS + CLIP).to(tl.int32)
    if clip > 0:
        area = side * side
        bins = tl.arange(0, 256)
        counts = bins * 0
        for first in range(0, area, BLOCK):
            at = first + tl.arange(0, BLOCK)
            y, x = mirrored(cell // 8 * side + at // side, size), mirrored(cell % 8 * side + at % side, size)
            r, g, b = load(image, y, x, size, at < area)
            r, g, b = _linear(constants, r), _linear(constants, g), _linear(constants, b)
            level = tl.where(at < area, _lightness(constants, r, g, b), 0)
            counts += tl.histogram(level, 256)
        counts -= tl.where(
            bins == 0, (BLOCK - area % BLOCK) % BLOCK, 0
        )  # cells beyond the area; Triton 3.2 has no masked histogram
        excess = tl.sum(tl.maximum(counts - clip, 0))
        rest = excess % 256
        step = tl.maximum(256 // tl.maximum(rest, 1), 1)
        extra = ((bins % step == 0) & (bins // step < rest)).to(tl.int32)
        total = tl.cumsum(tl.minimum(counts, clip) + excess // 256 + extra)
        entries = to_level(total.to(tl.float32) * (255.0 / (area * 1.0)))
        tl.store(out + (row * 64 + cell) * 256 + bins, entries.to(tl.uint8))


@triton.jit
def finish_kernel(images, table, tables, constants, out, size, side, BLOCK: tl.constexpr):
    """``out`` = the images, their lightness through the tables of CLAHE where it was drawn, finished."""
    row, at, y, x, mask = place(size, BLOCK)
    p = table + row * COLUMNS
    r, g, b = load(images + row * size * size * 3, y, x, size, mask)
    if tl.load(p + CLIP) > 0:
        lr, lg, lb = _linear(constants, r), _linear(constants, g), _linear(constants, b)
        level = _lightness(constants, lr, lg, lb)
        lr, lg, lb = lr * (1.0 / 65535.0), lg * (1.0 / 65535.0), lb * (1.0 / 65535.0)
        v, u = y.to(tl.float32) / side - 0.5, x.to(tl.float32) / side - 0.5
        top, left = tl.floor(v), tl.floor(u)
        down, across = v - top, u - left
        y0, x0 = tl.maximum(top, 0.0).to(tl.int32), tl.maximum(left, 0.0).to(tl.int32)
        y1, x1 = tl.minimum(top + 1.0, 7.0).to(tl.int32), tl.minimum(left + 1.0, 7.0).to(tl.int32)
        cells = tables + row * 16384 + level
        a = tl.load(cells + (y0 * 8 + x0) * 256, mask, 0).to(tl.float32)
        c = tl.load(cells + (y0 * 8 + x1) * 256, mask, 0).to(tl.float32)
        d = tl.load(cells + (y1 * 8 + x0) * 256, mask, 0).to(tl.float32)
        e = tl.load(cells + (y1 * 8 + x1) * 256, mask, 0).to(tl.float32)
        upper = a + (c - a) * across
        change = (upper + (d + (e - d) * across - upper) * down - level.to(tl.float32)) * (1.0 / (255.0 * 1.16))
        i = _cube(_root(0.412453 / 0.950456 * lr + 0.357580 / 0.950456 * lg + 0.180423 / 0.950456 * lb) + change)
        j = _cube(_root(0.212671 * lr + 0.715160 * lg + 0.072169 * lb) + change)
        k = _cube(_root(0.019334 / 1.088754 * lr + 0.119193 / 1.088754 * lg + 0.950227 / 1.088754 * lb) + change)
        r = _gamma(3.0799349 * i - 1.5371515 * j - 0.54278342 * k)
        g = _gamma(-0.92123418 * i + 1.87599 * j + 0.04524418 * k)
        b = _gamma(0.05288968 * i - 0.20404134 * j + 1.1511517 * k)
    r, g, b = finish_pixels(p, y, x, size, r, g, b)
    store(out + row * size * size * 3, constants, at, mask, r, g, b)
