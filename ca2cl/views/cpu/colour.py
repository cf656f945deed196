"""Colour passes of the ``crop`` recipe."""

from __future__ import annotations

from typing import Any

import numpy as np

from ca2cl.views.cpu.compiled import compiled

f = np.float32


@compiled
def stain(p: Any, densities: Any, planes: Any) -> None:
    """Map the optical densities linearly.

    Args:
        p: row of the table.
        densities: float32 (256,), -log(v / 255) of the levels v.
        planes: uint8 (3, S, S), changed in place.
    """
    m, size = p.stain, planes.shape[1]
    d, value = np.empty((3, size), np.float32), np.empty(size, np.float32)
    for row in range(size):
        for c in range(3):
            line = planes[c, row]
            for i in range(size):
                d[c, i] = densities[line[i]]
        for c in range(3):
            by_r, by_g, by_b, offset, line = m[3 * c], m[3 * c + 1], m[3 * c + 2], m[9 + c], planes[c, row]
            for i in range(size):
                # exp(-d) as the 8th power of exp(-d / 8), a polynomial; d from 0 to 8
                t = min(max(by_r * d[0, i] + by_g * d[1, i] + by_b * d[2, i] + offset, f(0)), f(8)) * f(0.125)
                v = ((f(0.025643392) * t - f(0.1539647)) * t + f(0.49570408)) * t - f(0.99948335)
                v = v * t + f(0.99999005)
                v *= v
                v *= v
                value[i] = v * v
            for i in range(size):
                line[i] = np.uint8(np.int32(value[i] * f(255) + f(0.5)))


@compiled
def colour(p: Any, planes: Any) -> None:
    """Map the colours linearly, the mean grey of the view as a summand; in place."""
    m, n = p.colour, planes.shape[1] * planes.shape[2]
    red, green, blue = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    sum_r, sum_g, sum_b = np.int64(0), np.int64(0), np.int64(0)
    for i in range(n):
        sum_r += red[i]
        sum_g += green[i]
        sum_b += blue[i]
    grey = (f(0.299) * f(sum_r) + f(0.587) * f(sum_g) + f(0.114) * f(sum_b)) / f(n) * m[9]
    rr, rg, rb, gr, gg, gb, br, bg, bb = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7], m[8]
    for i in range(n):
        r, g, b = f(red[i]), f(green[i]), f(blue[i])
        red[i] = np.uint8(np.int32(min(max(rr * r + rg * g + rb * b + grey, f(0)), f(255)) + f(0.5)))
        green[i] = np.uint8(np.int32(min(max(gr * r + gg * g + gb * b + grey, f(0)), f(255)) + f(0.5)))
        blue[i] = np.uint8(np.int32(min(max(br * r + bg * g + bb * b + grey, f(0)), f(255)) + f(0.5)))
