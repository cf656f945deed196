"""Contrast-limited adaptive histogram equalisation (CLAHE; Zuiderveld, 1994) of L of CIE L*a*b*.

Cells, clipping, rounding and interpolation are OpenCV's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ca2cl.views.cpu.compiled import compiled

f = np.float32


@compiled
def _linear(v: Any) -> Any:
    """Linear light of an sRGB value: the power 2.4 as a polynomial."""
    power = ((f(0.087288044) * v - f(0.30739146)) * v + f(0.6671726)) * v + f(0.51937765)
    power = (power * v + f(0.032746699)) * v + f(0.00091686466)
    return v * f(1 / 12.92) if v <= f(0.04045) else power


@compiled
def _gamma(v: Any) -> Any:
    """The sRGB value of linear light: the power 1 / 2.4 as a fraction of polynomials."""
    over = ((f(810.76254) * v + f(502.42917)) * v + f(18.04525)) * v - f(0.005257084)
    under = ((f(336.5654) * v + f(876.6042)) * v + f(117.55075)) * v + f(1)
    return v * f(12.92) if v <= f(0.0031308) else over / under


@compiled
def _root(v: Any) -> Any:
    """f of the definition of L*a*b*: a cube root, straight near black; as a fraction of polynomials."""
    over = ((f(362.48846) * v + f(339.30173)) * v + f(24.944921)) * v + f(0.11047257)
    under = ((f(177.72481) * v + f(469.94138)) * v + f(78.288635)) * v + f(1)
    return v * f(24389 / 27 / 116) + f(16 / 116) if v <= f(216 / 24389) else over / under


@compiled
def _cube(v: Any) -> Any:
    """The inverse of ``_root``."""
    return (v - f(16 / 116)) * f(27 * 116 / 24389) if v <= f(6 / 29) else v * v * v


@compiled
def _read_levels(planes: Any, linear: Any, lightness: Any, levels: Any) -> None:
    """Lightness as one of 256 levels (``draw.lightness``)."""
    red, green, blue, out = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1), levels.reshape(-1)
    for i in range(len(out)):
        luminance = 871 * linear[red[i]] + 2929 * linear[green[i]] + 296 * linear[blue[i]]
        out[i] = lightness[np.uint32(luminance >> 16)]


@compiled
def _fill_table(levels: Any, top: int, left: int, clip: int, table: Any) -> None:
    """The sums of a cell's clipped histogram, scaled to 255. Cells beyond the edge are mirrored."""
    last, side = levels.shape[0] - 1, -(-levels.shape[0] // 8)
    counts = np.zeros(256, np.int32)
    for y in range(top, top + side):
        line = levels[last - abs(last - y)]
        for x in range(left, left + side):
            counts[line[last - abs(last - x)]] += 1
    excess = 0
    for i in range(256):
        excess += max(counts[i] - clip, 0)
    share, rest = excess // 256, excess % 256
    step = max(256 // max(rest, 1), 1)
    total, scale = 0, f(255) / f(side * side)
    for i in range(256):
        # What is left over after equal shares goes to every step-th bin from the lowest on.
        total += min(counts[i], clip) + share + (1 if i % step == 0 and i // step < rest else 0)
        table[i] = np.uint8(np.int32(min(f(total) * scale, f(255)) + f(0.5)))


@compiled
def _fill_quads(levels: Any, clip: int, quads: Any) -> None:
    """The tables of the 8 x 8 cells; the entries of 4 neighbours in one word, so that one look-up reads them all."""
    side = -(-levels.shape[0] // 8)
    tables = np.empty((8, 8, 256), np.uint8)
    for row in range(8):
        for column in range(8):
            _fill_table(levels, row * side, column * side, clip, tables[row, column])
    for row in range(9):
        for column in range(9):
            top, low, left, right = max(row - 1, 0), min(row, 7), max(column - 1, 0), min(column, 7)
            a, b, c, d = tables[top, left], tables[top, right], tables[low, left], tables[low, right]
            out = quads[row, column]
            for i in range(256):
                out[i] = np.uint32(a[i]) | np.uint32(b[i] << 8) | np.uint32(c[i] << 16) | np.uint32(d[i] << 24)


@compiled
def equalise(p: Any, linear: Any, lightness: Any, planes: Any) -> None:
    """Equalise the lightness; a and b stay.

    In f(X), f(Y), f(Z) of the definition of L*a*b* a change of L is the same summand for all three.

    Args:
        p: row of the table.
        linear: ``LINEAR`` of ``draw.lightness``.
        lightness: ``LIGHTNESS`` of the same.
        planes: uint8 (3, S, S), changed in place.
    """
    size = planes.shape[1]
    levels, quads = np.empty((size, size), np.uint8), np.empty((9, 9, 256), np.uint32)
    words, flat = np.empty(size, np.uint32), quads.reshape(-1)
    _read_levels(planes, linear, lightness, levels)
    _fill_quads(levels, int(p.clip), quads)
    inverse = f(1) / f(-(-size // 8))
    for row in range(size):
        red, green, blue, level = planes[0, row], planes[1, row], planes[2, row], levels[row]
        y = f(row) * inverse - f(0.5)
        start, down = np.int32(np.floor(y) + f(1)) * np.int32(9), y - np.floor(y)
        for i in range(size):
            cell = start + np.int32(np.floor(f(np.int32(i)) * inverse - f(0.5)) + f(1))
            words[i] = flat[np.uint32(cell * np.int32(256)) + np.uint32(level[i])]
        for i in range(size):
            x = f(np.int32(i)) * inverse - f(0.5)
            across, word = x - np.floor(x), words[i]
            a, b = f(np.int32(word & np.uint32(255))), f(np.int32((word >> np.uint32(8)) & np.uint32(255)))
            c, d = f(np.int32((word >> np.uint32(16)) & np.uint32(255))), f(np.int32(word >> np.uint32(24)))
            upper = a + (b - a) * across
            change = (upper + (c + (d - c) * across - upper) * down - f(level[i])) * f(1 / (255 * 1.16))
            r, g, b = (
                _linear(f(red[i]) * f(1 / 255)),
                _linear(f(green[i]) * f(1 / 255)),
                _linear(f(blue[i]) * f(1 / 255)),
            )
            u = _root(f(0.412453 / 0.950456) * r + f(0.357580 / 0.950456) * g + f(0.180423 / 0.950456) * b)
            v = _root(f(0.212671) * r + f(0.715160) * g + f(0.072169) * b)
            w = _root(f(0.019334 / 1.088754) * r + f(0.119193 / 1.088754) * g + f(0.950227 / 1.088754) * b)
            u, v, w = _cube(u + change), _cube(v + change), _cube(w + change)
            r = _gamma(min(max(f(3.0799349) * u - f(1.5371515) * v - f(0.54278342) * w, f(0)), f(1)))
            g = _gamma(min(max(f(-0.92123418) * u + f(1.87599) * v + f(0.04524418) * w, f(0)), f(1)))
            b = _gamma(min(max(f(0.05288968) * u - f(0.20404134) * v + f(1.1511517) * w, f(0)), f(1)))
            red[i] = np.uint8(np.int32(r * f(255) + f(0.5)))
            green[i] = np.uint8(np.int32(g * f(255) + f(0.5)))
            blue[i] = np.uint8(np.int32(b * f(255) + f(0.5)))
