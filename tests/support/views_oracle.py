"""The views of docs/mathematics.md, one tile and one pixel after another, in double precision: what renderers are
compared with. 8 bits between the passes, as there."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import numpy as np

from ca2cl.views.draw.table import GAUSSIAN, GRID, MEDIAN, MOTION, NOISE, OPTICAL

Image = Any
_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_WHITE = np.array([0.950456, 1.0, 1.088754])


def view(tile: Image, row: Any, size: int) -> Image:
    """One view of a uint8 (H, W, 3) tile by its row of the table: uint8 (S, S, 3)."""
    image = read(tile, row, size)
    if row["stained"]:
        density = -np.log(np.maximum(image, 1.0) / 255.0)
        moved = density @ row["stain"][:9].reshape(3, 3).T.astype(float) + row["stain"][9:]
        image = _to_levels(np.exp(-np.clip(moved, 0, 8)) * 255.0)
    if row["coloured"]:
        grey = image.mean((0, 1)) @ (0.299, 0.587, 0.114)
        image = _to_levels(image @ row["colour"][:9].reshape(3, 3).T.astype(float) + row["colour"][9] * grey)
    blurs = {GAUSSIAN: gaussian, MOTION: motion, MEDIAN: median, NOISE: noise}
    if row["blur"]:
        image = blurs[int(row["blur"])](image, row)
    if row["clip"]:
        image = equalise(image, int(row["clip"]))
    return finish(image, row).astype(np.uint8)


def _to_levels(image: Image) -> Image:
    return np.floor(np.clip(image, 0, 255) + 0.5)


def _through(numbers: Image, x: float, y: float) -> tuple[float, float]:
    a, b, c, d, e, f = numbers.tolist()
    return a * x + b * y + c, d * x + e * y + f


def read(tile: Image, row: Any, size: int) -> Image:
    """Geometry, then brightness and contrast."""
    k = int(row["reduce"])
    height, width = tile.shape[0] // k, tile.shape[1] // k
    blocks = tile[: height * k, : width * k].reshape(height, k, width, k, 3).astype(float)
    tile = _to_levels(blocks.mean((1, 3)))
    out = np.zeros((size, size, 3))
    for i, j in np.ndindex(size, size):
        x, y = _through(row["affine"], (2 * j + 1) / size - 1, (2 * i + 1) / size - 1)
        if row["bend"] == OPTICAL:
            r = math.hypot(x, y) / 2
            x, y = (at * (1 + row["optical"] * (r**2 + r**4)) for at in (x, y))
        if row["bend"] == GRID:
            x, y = _stretch(x, row["grid_x"]), _stretch(y, row["grid_y"])
        x, y = _through(row["turn"], x, y)
        out[i, j] = _bilinear(tile, (y + 1) / 2 * height - 0.5, (x + 1) / 2 * width - 0.5)
    scale, offset, highest = row["adjust"].astype(float)
    return np.floor(np.clip(out * scale + offset, 0, highest) + 0.5)


def _stretch(at: float, steps: Image) -> float:
    """Cells of 2/5 one after another from -1 on, each stretched by its factor; beyond the edges nothing moves on."""
    return -1 + sum(float(step) * min(max(at + 1 - 0.4 * cell, 0.0), 0.4) for cell, step in enumerate(steps))


def _bilinear(image: Image, y: float, x: float) -> Image:
    """Reflected at the image's edges."""
    sides = []
    for at, n in ((y, image.shape[0]), (x, image.shape[1])):
        t = abs(at + 0.5) % (2 * n)
        sides.append(min(max(min(t, 2 * n - t) - 0.5, 0.0), n - 1.0))
    top, left = int(sides[0]), int(sides[1])
    down, right = sides[0] - top, sides[1] - left
    low, far = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
    upper = image[top, left] * (1 - right) + image[top, far] * right
    return upper * (1 - down) + (image[low, left] * (1 - right) + image[low, far] * right) * down


def _padded(image: Image, radius: int, mode: Any) -> Image:
    return np.pad(image, ((radius, radius), (radius, radius), (0, 0)), mode=mode)


def gaussian(image: Image, row: Any) -> Image:
    radius, sigma = int(row["radius"]), float(row["sigma"])
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights, padded, size = weights / weights.sum(), _padded(image, radius, "reflect"), len(image)
    rows = _to_levels(sum(w * padded[:, t : t + size] for t, w in enumerate(weights)))
    return _to_levels(sum(w * rows[t : t + size] for t, w in enumerate(weights)))


def motion(image: Image, row: Any) -> Image:
    y0, x0, y1, x1 = row["line"].astype(int)
    steps = max(abs(y1 - y0), abs(x1 - x0))
    padded, size = _padded(image, 2, "reflect"), len(image)
    taps = [
        (y0 + math.floor((y1 - y0) * t / steps + 0.5), x0 + math.floor((x1 - x0) * t / steps + 0.5))
        for t in range(steps + 1)
    ]
    return _to_levels(sum(padded[2 + y : 2 + y + size, 2 + x : 2 + x + size] for y, x in taps) / len(taps))


def median(image: Image, row: Any) -> Image:
    side = 2 * int(row["radius"]) + 1
    padded, out = _padded(image, side // 2, "edge"), np.zeros_like(image)
    for i, j, c in np.ndindex(*image.shape):
        out[i, j, c] = np.median(padded[i : i + side, j : j + side, c])
    return out


def noise(image: Image, row: Any) -> Image:
    """The number of a channel's pixel is hashed twice with the sample's word; 8 bytes are summed."""
    size = len(image)
    number = np.arange(3 * size * size, dtype=np.uint32).reshape(3, size, size).transpose(1, 2, 0)
    seed = _mix(np.array(row["noise"]).astype(np.uint32))
    hashes = np.stack([_mix(seed + number * np.uint32(2) + np.uint32(i)) for i in (0, 1)])
    total = sum((hashes >> np.uint32(8 * byte)) & np.uint32(255) for byte in range(4)).astype(float).sum(0)
    normal = (total - 8 * 127.5) / math.sqrt(8 * (256**2 - 1) / 12)
    return _to_levels(image + float(row["deviation"]) * normal)


def _mix(word: Image) -> Image:
    with np.errstate(over="ignore"):
        word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
        word = (word ^ (word >> np.uint32(15))) * np.uint32(0x846CA68B)
    return word ^ (word >> np.uint32(16))


def to_lab(rgb: Image) -> Image:
    """L in 0 … 100, a, b of sRGB colours in [0, 1] (CIE 1976, D65)."""
    light = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    t = light @ _XYZ.T / _WHITE
    x, y, z = np.moveaxis(np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29), -1, 0)
    return np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), -1)


def from_lab(lab: Image) -> Image:
    """The inverse, held in [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    t = np.stack((y + lab[..., 1] / 500, y, y - lab[..., 2] / 200), -1)
    xyz = np.where(t > 6 / 29, t**3, 3 * (6 / 29) ** 2 * (t - 4 / 29)) * _WHITE
    light = np.clip(xyz @ np.linalg.inv(_XYZ).T, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def equalise(image: Image, clip: int) -> Image:
    """CLAHE of lightness, as OpenCV has it."""
    lab = to_lab(image / 255.0)
    levels = lightness_levels(image)
    lab[..., 0] += (equalise_levels(levels, clip) - levels) / 2.55
    return _to_levels(from_lab(lab) * 255.0)


def lightness_levels(image: Image) -> Image:
    """L as one of 256 levels: luminance in 4,096 steps, of linear light in 65,536 steps."""
    v = image / 255.0
    light = np.round(65535 * np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4))
    steps = (light @ (871, 2929, 296)) // 65536
    t = (steps + 0.5) / 4096
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.round(2.55 * (116 * f - 16)).astype(int)


def equalise_levels(levels: Image, clip: int) -> Image:
    """One plane of levels: tables of 8 × 8 cells, interpolated."""
    size, side = len(levels), -(-len(levels) // 8)
    padded = np.pad(levels, (0, 8 * side - size), mode="reflect")
    tables = np.zeros((8, 8, 256))
    for row, column in np.ndindex(8, 8):
        cell = padded[row * side : (row + 1) * side, column * side : (column + 1) * side]
        counts = np.bincount(cell.ravel(), minlength=256)
        excess = int(np.maximum(counts - clip, 0).sum())
        counts = np.minimum(counts, clip) + excess // 256
        if excess % 256:
            step = max(256 // (excess % 256), 1)
            counts[: step * (excess % 256) : step] += 1
        tables[row, column] = _to_levels(counts.cumsum() * 255.0 / side**2)
    out = np.zeros((size, size))
    for i, j in np.ndindex(size, size):
        y, x = i / side - 0.5, j / side - 0.5
        low, left = math.floor(y), math.floor(x)
        for row, down in ((low, 1 - (y - low)), (low + 1, y - low)):
            for column, right in ((left, 1 - (x - left)), (left + 1, x - left)):
                out[i, j] += down * right * tables[min(max(row, 0), 7), min(max(column, 0), 7), levels[i, j]]
    return out


def finish(image: Image, row: Any) -> Image:
    """Hue, saturation and value; black frame and hole."""
    size, out = len(image), image / 255.0
    for i, j in np.ndindex(size, size):
        if row["shifted"]:
            hue, saturation, value = colorsys.rgb_to_hsv(*out[i, j])
            by_hue, by_saturation, by_value = row["hsv"].astype(float)
            held = [min(max(x, 0.0), 1.0) for x in (saturation + by_saturation, value + by_value)]
            out[i, j] = colorsys.hsv_to_rgb((hue + by_hue / 6) % 1.0, *held)
        if row["border"]:
            x, y = _through(row["affine"], (2 * j + 1) / size - 1, (2 * i + 1) / size - 1)
            for at in (x, y):
                out[i, j] *= min(max((size + 1) / 2 - abs(at) * size / 2, 0.0), 1.0)
    top, left, side = row["hole"].astype(int)
    out = _to_levels(out * 255.0)
    out[top : top + side, left : left + side] = 0
    return out
