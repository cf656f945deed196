"""Last pass of a view: colour, black frame and hole, normalisation."""

from __future__ import annotations

from typing import Any

import numpy as np

from ca2cl.views.cpu.compiled import compiled

f = np.float32


@compiled
def _shift(p: Any, rgb: Any) -> None:
    """Hue turned, saturation and value moved.

    From red over green to cyan, (g - low) + (b - low) + (high - r) rises from 0 to three times the chroma; from red
    over blue it does the same. So no pixel asks which of its channels is the largest.
    """
    red, green, blue, hue, saturation, value = rgb[0], rgb[1], rgb[2], p.hsv[0], p.hsv[1], p.hsv[2]
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        high, low = max(r, max(g, b)), min(r, min(g, b))
        angle = ((g - low) + (b - low) + (high - r)) / max(high - low, f(1e-6))
        angle = (angle if g >= b else -angle) + hue
        chroma = (high - low) / max(high, f(1e-6))
        high = min(max(high + value, f(0)), f(1))
        chroma = min(max(chroma + saturation, f(0)), f(1)) * high
        red[i] = high - chroma * min(max(abs(angle) - f(1), f(0)), f(1))
        green[i] = high - chroma * min(max(abs(abs(angle + f(1)) - f(3)) - f(1), f(0)), f(1))
        blue[i] = high - chroma * min(max(abs(abs(angle - f(1)) - f(3)) - f(1), f(0)), f(1))


@compiled
def _frame(p: Any, row: int, rgb: Any) -> None:
    """Black where the first map reads outside of the tile."""
    red, green, blue = rgb[0], rgb[1], rgb[2]
    size = len(red)
    half, ny = f(size) * f(0.5), f(2 * row + 1 - size) / f(size)
    a, b, d, e = p.affine[0], p.affine[1] * ny + p.affine[2], p.affine[3], p.affine[4] * ny + p.affine[5]
    for i in range(size):
        nx = f(np.int32(2 * i + 1 - size)) / f(size)
        x, y = abs(a * nx + b), abs(d * nx + e)
        share = min(max(half + f(0.5) - x * half, f(0)), f(1)) * min(max(half + f(0.5) - y * half, f(0)), f(1))
        red[i] *= share
        green[i] *= share
        blue[i] *= share


@compiled
def finish(p: Any, planes: Any, colours: Any, out: Any) -> None:
    """Hue, saturation, value, frame and hole, and the colours as the encoder takes them.

    Args:
        p: row of the table.
        planes: uint8 (3, S, S), changed.
        colours: (3, 256), what a level of a channel becomes.
        out: (S, S, 3) of the colours' type, written.
    """
    size = planes.shape[1]
    rgb = np.empty((3, size), np.float32)
    top, left, side = int(p.hole[0]), int(p.hole[1]), int(p.hole[2])
    for row in range(size):
        red, green, blue, to = planes[0, row], planes[1, row], planes[2, row], out[row]
        if p.shifted or p.border:
            for c in range(3):
                line, values = planes[c, row], rgb[c]
                for i in range(size):
                    values[i] = f(line[i]) * f(1 / 255)
            if p.shifted:
                _shift(p, rgb)
            if p.border:
                _frame(p, row, rgb)
            for c in range(3):
                line, values = planes[c, row], rgb[c]
                for i in range(size):
                    line[i] = np.uint8(np.int32(values[i] * f(255) + f(0.5)))
        if top <= row < top + side:
            planes[:, row, left : left + side] = 0
        for i in range(size):
            to[i, 0] = colours[0, red[i]]
            to[i, 1] = colours[1, green[i]]
            to[i, 2] = colours[2, blue[i]]
