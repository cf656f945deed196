"""Synthetic glands, the parts of normal mucosa."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.data.synthetic.painting import Array, Field, grid, noise, ramp, sample_field, scatter, stamp

_HARMONICS = np.arange(2, 6)


class Glands(NamedTuple):
    """Positions of glands: each field is (H, W)."""

    rho: Field
    """Distance from the gland's centre over its radius in that direction: below 1 inside."""
    owner: npt.NDArray[np.int32]
    """Number of the gland that a pixel belongs to, from 1; 0 in the stroma."""
    depth: Field
    """Pixels from the nearest outline, that of a neighbour included: positive in a gland, negative in the stroma."""


def lay_glands(rng: np.random.Generator, shape: tuple[int, int], spacing: float, fill: float, wobble: float) -> Glands:
    """Star-shaped glands about ``spacing`` pixels apart.

    Args:
        fill: mean radius in half spacings; from about 1 neighbours press on each other and share an outline.
        wobble: standard deviation of the radius along the outline, as a fraction of it.
    """
    points = scatter(rng, shape, spacing, jitter=0.1)
    y, x = grid(*shape)
    rho = np.full(shape, np.inf, np.float32)
    owner = np.zeros(shape, np.int32)
    for number, (cy, cx) in enumerate(points, start=1):
        amplitude = rng.normal(0, wobble, len(_HARMONICS)) / _HARMONICS * 2
        phase = rng.uniform(0, 2 * np.pi, len(_HARMONICS))
        mean = spacing / 2 * fill * rng.uniform(0.8, 1.15)
        reach = int(mean * 1.6) + 1
        box = np.s_[
            max(int(cy) - reach, 0) : max(int(cy) + reach, 0), max(int(cx) - reach, 0) : max(int(cx) + reach, 0)
        ]
        dy, dx = y[box] - cy, x[box] - cx
        theta = np.arctan2(dy, dx)
        bumps = sum(a * np.cos(k * theta + p) for a, k, p in zip(amplitude, _HARMONICS, phase, strict=True))
        radius = mean * np.clip(1 + bumps, 0.5, 1.6)
        own = (np.hypot(dy, dx) / radius).astype(np.float32)
        nearer = own < rho[box]
        rho[box] = np.where(nearer, own, rho[box])
        owner[box] = np.where(nearer & (own < 1), number, owner[box])
    owner = _connected(owner)
    return Glands(rho, owner, _depth(owner))


def _depth(owner: npt.NDArray[np.int32]) -> Field:
    """Signed distance (H, W) in pixels to the nearest pixel whose right or lower neighbour belongs elsewhere."""
    outline = np.zeros(owner.shape, bool)
    outline[:-1] |= owner[:-1] != owner[1:]
    outline[:, :-1] |= owner[:, :-1] != owner[:, 1:]
    if not outline.any():
        reach = np.float32(np.hypot(*owner.shape))
        return np.asarray(np.where(owner > 0, reach, -reach), np.float32)
    distance = ndimage.distance_transform_edt(~outline).astype(np.float32)
    return np.asarray(np.where(owner > 0, distance, -distance), np.float32)


def _connected(owner: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Keep of every gland only its largest part: two outlines that cross can cut a sliver off."""
    kept = np.zeros_like(owner)
    for number, box in enumerate(ndimage.find_objects(owner), start=1):
        if box is None:
            continue
        parts, count = ndimage.label(owner[box] == number)
        largest = parts == 1 + np.argmax(np.bincount(parts.ravel())[1:]) if count > 1 else parts == 1
        kept[box][largest] = number
    return kept


def paint_glands(rng: np.random.Generator, glands: Glands, unit: float, lumen: float) -> tuple[Field, Field]:
    """Haematoxylin and eosin of glands in their stroma, each (H, W).

    A gland has a row of oval nuclei along its outline, pale goblet cells above them and an empty lumen inside the
    fraction ``lumen`` of its radius; between glands lie loose fibres and a few round nuclei.

    Args:
        rng: draws nuclei and fibres.
        glands: where they lie.
        unit: pixels that all sizes are multiples of.
        lumen: empty share of a gland's radius.
    """
    shape = glands.owner.shape
    inside = glands.owner > 0
    edge = glands.rho + 0.06 * noise(rng, shape, 5 * unit)
    hollow = ramp(edge, lumen, lumen - 0.1) if lumen > 0 else np.zeros(shape, np.float32)
    goblet = stamp(shape, scatter(rng, shape, 7 * unit, 0.12), 2.8 * unit, 2.8 * unit)
    goblet *= ramp(glands.depth, 5 * unit, 7 * unit) * inside
    fibres = noise(rng, shape, 14 * unit, 3 * unit, rng.uniform(0, np.pi))
    eosin = np.where(inside, 0.75 - 0.45 * goblet, 0.55 + 0.22 * fibres)
    haematoxylin = np.where(inside, 0.25 + 0.1 * goblet, 0.12)
    points = scatter(rng, shape, 3.6 * unit, 0.16)
    depth = sample_field(glands.depth, points)
    basal = points[
        (depth > 1.8 * unit) & (depth < 4.8 * unit) & (sample_field(glands.owner.astype(np.float32), points) > 0)
    ]
    stroma = points[(depth < -1.5 * unit) & (rng.random(len(points)) < 0.16)]
    angle = np.arctan2(*_gradient_at(glands.depth, basal))  # across the outline: columnar cells stand on it
    row = stamp(shape, basal, 2.9 * unit, 1.7 * unit, angle, rng.uniform(0.7, 1, len(basal)))
    loose = stamp(shape, stroma, 2.4 * unit, 1.5 * unit, rng.uniform(0, np.pi, len(stroma)))
    solid = 1 - hollow * inside
    haematoxylin = (haematoxylin + 1.1 * np.maximum(row, loose)) * solid
    return haematoxylin.astype(np.float32), (eosin * solid).astype(np.float32)


def _gradient_at(field: Field, points: Array) -> tuple[Field, Field]:
    """Gradient (d/dy, d/dx) of ``field`` at points (N, 2)."""
    dy, dx = np.gradient(field)
    return sample_field(dy, points), sample_field(dx, points)
