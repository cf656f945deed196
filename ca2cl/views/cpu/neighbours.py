"""Blur and noise, in place, of planes uint8 (3, S, S).

``p`` is a row of the table.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ca2cl.views.cpu.compiled import compiled

f = np.float32


@compiled
def _padded(plane: Any, radius: int, mirrored: bool) -> Any:
    """A plane with a margin: its pixels mirrored about the outermost, or these repeated."""
    size = plane.shape[0]
    out = np.empty((size + 2 * radius, size + 2 * radius), np.uint8)
    last = size - 1
    for row in range(len(out)):
        y = row - radius
        y = last - abs(last - abs(y)) if mirrored else min(max(y, 0), last)
        out[row, radius : radius + size] = plane[y]
        for i in range(radius):
            out[row, i] = plane[y, radius - i if mirrored else 0]
            out[row, radius + size + i] = plane[y, last - 1 - i if mirrored else last]
    return out


@compiled
def gaussian(p: Any, planes: Any) -> None:
    """A Gaussian blur by rows, then by columns, mirrored at the edges."""
    size, radius = planes.shape[1], int(p.radius)
    weights = np.exp(f(-0.5) * (np.arange(radius + 1).astype(np.float32) / p.sigma) ** 2)
    weights /= f(2) * weights.sum() - weights[0]
    rows, total = np.empty((size + 2 * radius, size), np.uint8), np.empty(size, np.float32)
    for c in range(3):
        padded = _padded(planes[c], radius, True)
        for row in range(len(rows)):
            total[:] = f(0.5)
            for tap in range(radius + 1):
                one, other = padded[row, radius - tap :], padded[row, radius + tap :]
                weight = weights[tap] if tap else f(0.5) * weights[0]
                for i in range(size):
                    total[i] += weight * (f(one[i]) + f(other[i]))
            line = rows[row]
            for i in range(size):
                line[i] = np.uint8(np.int32(total[i]))
        for row in range(size):
            total[:] = f(0.5)
            for tap in range(radius + 1):
                one, other = rows[radius + row - tap], rows[radius + row + tap]
                weight = weights[tap] if tap else f(0.5) * weights[0]
                for i in range(size):
                    total[i] += weight * (f(one[i]) + f(other[i]))
            line = planes[c, row]
            for i in range(size):
                line[i] = np.uint8(np.int32(total[i]))


@compiled
def motion(p: Any, planes: Any) -> None:
    """The mean along a line of pixels, mirrored at the edges."""
    size = planes.shape[1]
    total = np.empty(size, np.float32)
    y, x = p.line[0], p.line[1]
    dy, dx = p.line[2] - y, p.line[3] - x
    steps = max(abs(dy), abs(dx))
    share = f(1) / (steps + f(1))
    for c in range(3):
        padded = _padded(planes[c], 2, True)
        for row in range(size):
            total[:] = f(0)
            for tap in range(int(steps) + 1):
                part = f(tap) / steps
                down, right = int(np.floor(y + dy * part + f(0.5))), int(np.floor(x + dx * part + f(0.5)))
                source = padded[row + 2 + down, 2 + right :]
                for i in range(size):
                    total[i] += f(source[i])
            line = planes[c, row]
            for i in range(size):
                line[i] = np.uint8(np.int32(total[i] * share + f(0.5)))


@compiled
def median(p: Any, planes: Any) -> None:
    """The median of a window, its edge pixels repeated: the largest v that at most half of it lies below, by bits."""
    size, radius = planes.shape[1], int(p.radius)
    side, stride = 2 * radius + 1, size + 2 * radius
    half, block = np.uint8(side * side // 2), 16  # rows that stay in a core's nearest cache
    value = np.empty((block, stride), np.uint8)
    trial, below = np.empty(block * stride, np.uint8), np.empty(block * stride, np.uint8)
    for c in range(3):
        padded = _padded(planes[c], radius, False).reshape(-1)
        for first in range(0, size, block):
            rows = min(block, size - first)
            n, flat = rows * stride - 2 * radius, value.reshape(-1)
            flat[:] = 0
            for bit in (128, 64, 32, 16, 8, 4, 2, 1):
                for i in range(n):
                    trial[i] = flat[i] | np.uint8(bit)
                below[:] = 0
                for dy in range(side):
                    for dx in range(side):
                        source = padded[(first + dy) * stride + dx :]
                        for i in range(n):
                            below[i] += np.uint8(source[i] < trial[i])
                for i in range(n):
                    flat[i] |= np.uint8(bit) * np.uint8(below[i] <= half)
            planes[c, first : first + rows] = value[:rows, :size]


@compiled
def _mix(word: Any) -> Any:
    """A bijection of 32-bit words in which every input bit flips half of the output's (Wellons' lowbias32)."""
    word = np.uint32(word ^ (word >> np.uint32(16)))
    word = np.uint32(word * np.uint32(0x7FEB352D))
    word = np.uint32(word ^ (word >> np.uint32(15)))
    word = np.uint32(word * np.uint32(0x846CA68B))
    return np.uint32(word ^ (word >> np.uint32(16)))


@compiled
def noise(p: Any, planes: Any) -> None:
    """Gaussian noise: the sum of a hash's 8 uniform bytes has a normal number's moments but for a kurtosis of 2.85."""
    flat = planes.reshape(-1)
    seed = _mix(np.uint32(np.int32(p.noise)))
    scale, pairs = p.deviation * f((8 * (256 * 256 - 1) / 12) ** -0.5), np.uint32(0x00FF00FF)
    for i in range(len(flat)):
        one = _mix(np.uint32(seed + np.uint32(2 * i)))
        two = _mix(np.uint32(seed + np.uint32(2 * i + 1)))
        sums = (one & pairs) + ((one >> np.uint32(8)) & pairs) + (two & pairs) + ((two >> np.uint32(8)) & pairs)
        normal = f(np.int32((sums & np.uint32(0xFFFF)) + (sums >> np.uint32(16)))) - f(1020)
        flat[i] = np.uint8(np.int32(min(max(f(flat[i]) + normal * scale, f(0)), f(255)) + f(0.5)))
