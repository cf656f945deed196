"""Drawing primitives of synthetic tissue: fields, nuclei, outlines and stains.

A picture is two concentration fields, haematoxylin and eosin, float32 (H, W), of no unit; light turns them into
colours by the law of Beer and Lambert. ``unit`` is the length of about 1.2 micrometres in pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Field = npt.NDArray[np.float32]
Image = npt.NDArray[np.uint8]
Array = npt.NDArray[np.float64]

# Haematoxylin's and eosin's optical density of R, G, B for one unit of stain: Macenko et al., ISBI 2009.
STAINS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]], np.float32)


class Look(NamedTuple):
    """The colours of a slide."""

    stains: npt.NDArray[Any] = STAINS
    """The two stains' optical densities in R, G and B for one unit of stain, (2, 3)."""
    light: npt.NDArray[Any] | float = 1.0
    """Intensity of R, G and B without stain, (3,), 1 for a full white."""


PLAIN = Look()


def draw_look(rng: np.random.Generator) -> Look:
    """A slide's look: hue and strength of each stain, and white balance, as laboratories and scanners differ."""
    hue, strength = np.exp(rng.normal(0, 0.2, STAINS.shape)), np.exp(rng.uniform(-0.5, 0.5, (2, 1)))
    return Look(STAINS * hue * strength, rng.uniform(0.8, 1, 3))


@lru_cache(maxsize=8)
def _frequencies(height: int, width: int) -> tuple[Field, Field]:
    fy, fx = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    return fy.astype(np.float32), fx.astype(np.float32)


def grid(height: int, width: int) -> tuple[Field, Field]:
    """Pixel coordinates (y, x), each (H, W)."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return y, x


def noise(rng: np.random.Generator, shape: tuple[int, int], along: float, across: float = 0, angle: float = 0) -> Field:
    """A Gaussian random field of mean 0 and standard deviation 1, periodic at the borders.

    Args:
        along: correlation length in pixels in the direction ``angle`` (radians, from the x axis towards y).
        across: the same at right angles to it; 0 for an isotropic field.
    """
    fy, fx = _frequencies(*shape)
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = (fx * cos + fy * sin) * along, (fy * cos - fx * sin) * (across or along)
    spectrum = np.fft.rfft2(rng.standard_normal(shape, dtype=np.float32)) * np.exp(-np.pi * (u * u + v * v))
    field = np.fft.irfft2(spectrum, s=shape).astype(np.float32)
    field -= field.mean()
    return np.asarray(field / (field.std() + 1e-6), np.float32)


def ramp(value: Field, low: float, high: float) -> Field:
    """0 below ``low``, 1 above ``high``, linear between: a threshold without jagged edges."""
    return np.asarray(np.clip((value - low) / (high - low), 0, 1), np.float32)


def scatter(
    rng: np.random.Generator, shape: tuple[int, int], spacing: float, jitter: float = 0.35, keep: float = 1.0
) -> Array:
    """Points (N, 2) as (y, x) about ``spacing`` pixels apart: a hexagonal lattice, each point moved at random.

    The lattice reaches one spacing past the borders.

    Args:
        rng: draws the moves.
        shape: height and width in pixels.
        spacing: between neighbours, in pixels.
        jitter: standard deviation of a move, in spacings.
        keep: share of the points that are kept, drawn at random; 1 draws nothing.
    """
    rows = np.arange(-spacing, shape[0] + 2 * spacing, spacing * 0.87)
    columns = np.arange(-spacing, shape[1] + 2 * spacing, spacing)
    y, x = np.meshgrid(rows, columns, indexing="ij")
    x[::2] += spacing / 2
    points = np.stack([y.ravel(), x.ravel()], axis=1) - rng.random(2) * spacing
    points = points + rng.normal(0, jitter * spacing, points.shape)
    return points if keep == 1 else points[rng.random(len(points)) < keep]


def sample_field(field: Any, points: Array) -> npt.NDArray[Any]:
    """The value of a field (H, W) at each point (N, 2), that of the nearest pixel inside."""
    y = np.clip(points[:, 0].round().astype(int), 0, field.shape[0] - 1)
    x = np.clip(points[:, 1].round().astype(int), 0, field.shape[1] - 1)
    return np.asarray(field[y, x])


def stamp(
    shape: tuple[int, int],
    points: Array,
    long: Array | float,
    short: Array | float,
    angle: Array | float = 0.0,
    strength: Array | float = 1.0,
) -> Field:
    """Filled ellipses with edges about a pixel and a half soft: the maximum over all of them, (H, W).

    Args:
        points: centres (N, 2) as (y, x).
        long, short: semi-axes in pixels, a number or (N,).
        angle: of the long axis in radians, from the x axis towards y.
        strength: height of each, with a paler middle, as a vesicular nucleus has.
    """
    canvas = np.zeros(shape[0] * shape[1], np.float32)
    if not len(points):
        return canvas.reshape(shape)
    a, b, turn, high = (np.broadcast_to(np.asarray(v, np.float32), len(points)) for v in (long, short, angle, strength))
    reach = int(np.ceil(a.max())) + 1
    offsets = np.arange(-reach, reach + 1)
    base = np.floor(points).astype(int)
    y = base[:, 0, None, None] + offsets[None, :, None]
    x = base[:, 1, None, None] + offsets[None, None, :]
    dy, dx = (y - points[:, 0, None, None]).astype(np.float32), (x - points[:, 1, None, None]).astype(np.float32)
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]
    rho = np.hypot((dx * cos + dy * sin) / a[:, None, None], (dy * cos - dx * sin) / b[:, None, None])
    value = np.clip((1 - rho) * b[:, None, None] / 1.5 + 0.5, 0, 1) * (0.75 + 0.25 * np.minimum(rho, 1))
    value *= high[:, None, None]
    inside = (value > 0) & (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    np.maximum.at(canvas, (y * shape[1] + x)[inside], value[inside])
    return canvas.reshape(shape)


def cells(points: Array, shape: tuple[int, int]) -> Field:
    """Voronoi cells of ``points`` (N, 2), N >= 2: second-nearest minus nearest distance in pixels (H, W).

    It is 0 on a wall.
    """
    y, x = grid(*shape)
    at = points.astype(np.float32)
    square = (y[..., None] - at[:, 0]) ** 2 + (x[..., None] - at[:, 1]) ** 2
    first, second = np.sqrt(np.moveaxis(np.partition(square, 1, axis=-1)[..., :2], -1, 0))
    return np.asarray(second - first, np.float32)


def strands(rng: np.random.Generator, phase: Field) -> Field:
    """Irregular bands along the level lines of ``phase`` (H, W), about one a unit of phase: mean 0, deviation about 1.

    The profile across the bands is smooth noise and not a sine, or they would look like a fingerprint.
    """
    low, high = float(phase.min()), float(phase.max())
    knots = np.arange(low - 1, high + 1.125, 0.125)
    ripple = np.exp(-(np.linspace(-2, 2, 13) ** 2))
    profile = np.convolve(rng.standard_normal(len(knots) + 12), ripple / np.sqrt((ripple**2).sum()), "valid")
    return np.interp(phase.ravel(), knots, profile).reshape(phase.shape).astype(np.float32)


def render(haematoxylin: Field, eosin: Field, light: Field | float = 1.0, stains: Field = STAINS) -> Image:
    """Light through both stains, by the law of Beer and Lambert: uint8 (H, W, 3), RGB.

    Args:
        haematoxylin: amount of the stain, (H, W).
        eosin: likewise.
        light: intensity without stain, 1 for a full white: a number, (H, W) or (H, W, 3).
        stains: (2, 3), the two stains' optical densities in R, G and B.
    """
    density = haematoxylin[..., None] * stains[0] + eosin[..., None] * stains[1]
    shine = np.asarray(light, np.float32)
    picture = 250.0 * (shine[..., None] if shine.ndim == 2 else shine) * np.exp(-density)
    return np.asarray(np.clip(picture + 0.5, 0, 255), np.uint8)


def stain(
    rng: np.random.Generator, haematoxylin: npt.NDArray[Any], eosin: npt.NDArray[Any], unit: float, look: Look = PLAIN
) -> Image:
    """Render with a stain, a tone and a light drawn from one distribution for all classes, about those of the slide.

    Mean and contrast of each stain are moved to drawn targets, so a class's own amount of stain tells little.

    Args:
        rng: draws stain, tone and light.
        haematoxylin: amount of the stain, (H, W).
        eosin: likewise.
        unit: pixels that all sizes are multiples of.
        look: the slide's.
    """
    shape = haematoxylin.shape
    means, spreads = rng.uniform((0.15, 0.25), (0.45, 0.65)), rng.uniform((0.09, 0.06), (0.25, 0.2))
    layers = [
        _match(rng, layer, mean, spread)
        for layer, mean, spread in zip((haematoxylin, eosin), means, spreads, strict=True)
    ]
    uneven, grain = rng.uniform((0.01, 0.01), (0.07, 0.04))
    light = rng.uniform(0.85, 1) + uneven * noise(rng, shape, 120 * unit) + grain * noise(rng, shape, 1.5)
    stains = look.stains * np.exp(rng.normal(0, 0.08, STAINS.shape))
    shine = light.astype(np.float32)[..., None] * np.asarray(look.light, np.float32)
    return render(layers[0], layers[1], shine, stains.astype(np.float32))


def _match(rng: np.random.Generator, layer: npt.NDArray[Any], mean: float, spread: float) -> Field:
    """A stain's layer under a drawn tone curve, moved to ``mean`` and towards the standard deviation ``spread``.

    Not all the way, or the haze on empty glass would look like tissue.
    """
    toned = _tone(rng, layer)
    contrast = spread**0.8 * layer.std() ** 0.2 / (toned.std() + 1e-6)
    matched = np.maximum(mean + (toned - toned.mean()) * contrast, 0)
    return np.asarray(matched * (mean / matched.mean()), np.float32)


def _tone(rng: np.random.Generator, layer: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """``layer`` from 0 to 1 under a rising curve: a drawn power, mixed in a drawn part with the layer's equalisation.

    A rising curve keeps every edge and takes from the histogram's shape what it would tell of the class.
    """
    low, high = layer.min(), layer.max()
    power = ((layer - low) / (high - low + 1e-6)) ** np.exp(rng.uniform(-0.7, 0.7))
    ranks = np.linspace(0, 1, 33)
    levels = np.quantile(power.ravel()[::7], ranks) + 1e-3 * ranks  # interp wants them rising where the layer is flat
    flat = np.interp(power.ravel(), levels, ranks).reshape(power.shape)
    mix = rng.uniform(0, 0.5)
    return np.asarray((1 - mix) * power + mix * flat)
