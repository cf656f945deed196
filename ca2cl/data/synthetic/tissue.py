"""Synthetic tissue tiles in nine classes, in NCT-CRC-HE's layout.

For tests, the quickstart and trials without data. The classes differ in structure as the real ones do. Their colour is
drawn for every tile from one distribution common to all classes. Mean and contrast of both stains are matched, the rest
of a histogram's shape only in part, so among tiles of one look a colour histogram still finds the class of three or
four tiles in ten. With ``slides``, each slide has its own stains and light, and a histogram is right for about two in
ten tiles of other slides; chance is one in nine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from ca2cl.common.files import fresh_folder
from ca2cl.data.synthetic.glands import lay_glands, paint_glands
from ca2cl.data.synthetic.painting import (
    PLAIN,
    Image,
    Look,
    cells,
    draw_look,
    grid,
    noise,
    ramp,
    sample_field,
    scatter,
    stain,
    stamp,
    strands,
)  # fmt: skip
from ca2cl.errors import InputError

_FIELD_OF_VIEW = 96  # unit lengths along a tile's side, whatever its size in pixels
_MOST_SLIDES = 1000
_SUFFIXES = (".tif", ".png", ".jpg", ".bmp", ".webp")
_Shape = tuple[int, int]
_Stains = tuple[npt.NDArray[Any], npt.NDArray[Any]]


def _adipose(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Fat: a honeycomb of empty cells with thin walls and a few flat nuclei in them."""
    points = scatter(rng, shape, rng.uniform(25, 34) * unit, 0.16)
    gap = cells(points, shape) + 0.8 * unit * noise(rng, shape, 12 * unit)
    wall = ramp(gap, rng.uniform(3.5, 5.5) * unit, 1.5 * unit)
    spots = scatter(rng, shape, 9 * unit)
    spots = spots[(sample_field(gap, spots) < 2 * unit) & (rng.random(len(spots)) < 0.5)]
    nuclei = stamp(shape, spots, 3.2 * unit, 1.2 * unit, rng.uniform(0, np.pi, len(spots)))
    haze = 0.03 * noise(rng, shape, 20 * unit)
    return 0.1 * wall + nuclei * wall, 0.06 + haze + 0.7 * wall


def _background(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Glass: uneven light, out-of-focus haze and a few specks of dust."""
    points = scatter(rng, shape, 26 * unit, keep=0.45)
    specks = stamp(
        shape, points, rng.uniform(0.8, 2.0, len(points)) * unit, 0.8 * unit, rng.uniform(0, np.pi, len(points))
    )
    haze = noise(rng, shape, rng.uniform(50, 90) * unit)
    return 0.15 + 0.02 * haze + 0.4 * specks, 0.3 + 0.04 * haze + 0.2 * specks


def _debris(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Necrosis: smudged fragments with torn edges, and nuclear dust of every size."""
    torn = noise(rng, shape, 16 * unit) + 0.6 * noise(rng, shape, 5 * unit)
    fragments = ramp(torn, -0.25, 0.15)
    grain = noise(rng, shape, 2.2 * unit)
    points = scatter(rng, shape, 3.6 * unit, 0.5)
    points = points[rng.random(len(points)) < 0.2 + 0.35 * sample_field(fragments, points)]
    radius = np.exp(rng.normal(-0.25, 0.5, len(points))) * unit
    dust = stamp(shape, points, radius * rng.uniform(1, 1.8, len(points)), radius, rng.uniform(0, np.pi, len(points)))
    return (0.12 + 0.1 * grain) * fragments + 0.9 * dust, 0.1 + (0.6 + 0.25 * grain) * fragments


def _lymphocytes(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """An infiltrate: small round dark nuclei of one size, packed, with hardly any cytoplasm."""
    points = scatter(rng, shape, rng.uniform(6.8, 8.0) * unit, 0.13, keep=0.93)
    radius = rng.normal(2.7, 0.2, len(points)) * unit
    nuclei = stamp(shape, points, radius * rng.uniform(1, 1.2, len(points)), radius, rng.uniform(0, np.pi, len(points)))
    cytoplasm = 0.25 + 0.12 * nuclei + 0.03 * noise(rng, shape, 14 * unit)
    return 0.08 + nuclei * (1 + 0.15 * noise(rng, shape, 2 * unit)), cytoplasm


def _mucus(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Pools of mucin: smooth pale streaks that swirl, and a rare cell."""
    y, x = grid(*shape)
    angle = rng.uniform(0, np.pi)
    swirl = noise(rng, shape, 60 * unit) * 9 * unit + noise(rng, shape, 24 * unit) * 1.5 * unit
    phase = (x * np.sin(angle) - y * np.cos(angle) + swirl) / (rng.uniform(9, 13) * unit)
    streaks = strands(rng, phase) * ramp(noise(rng, shape, 45 * unit), -1.5, 1)
    points = scatter(rng, shape, 30 * unit, keep=0.4)
    nuclei = stamp(shape, points, 2.6 * unit, 2.0 * unit, rng.uniform(0, np.pi, len(points)))
    return 0.2 + 0.07 * streaks + 0.6 * nuclei, 0.18 + 0.06 * streaks


def _muscle(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Smooth muscle: parallel dense fibres, and rod-shaped nuclei lying along them."""
    angle = rng.uniform(0, np.pi)
    fibres = noise(rng, shape, 60 * unit, 5 * unit, angle) + 0.4 * noise(rng, shape, 30 * unit, 2.2 * unit, angle)
    points = scatter(rng, shape, 14 * unit, keep=0.6)
    turn = angle + rng.normal(0, 0.07, len(points))
    nuclei = stamp(shape, points, rng.uniform(5, 8, len(points)) * unit, 1.4 * unit, turn)
    return 0.1 + 0.75 * nuclei, 0.8 + 0.16 * fibres


def _normal(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Normal mucosa: round regular crypts with a lumen, goblet cells and a row of basal nuclei."""
    glands = lay_glands(rng, shape, rng.uniform(40, 50) * unit, rng.uniform(0.84, 0.95), 0.03)
    return paint_glands(rng, glands, unit, rng.uniform(0.2, 0.35))


def _stroma(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Cancer-associated stroma: loose wavy fibres with gaps, and spindle nuclei that follow them."""
    y, x = grid(*shape)
    angle = rng.uniform(0, np.pi)
    bend = noise(rng, shape, 36 * unit) * 7 * unit
    phase = (x * np.sin(angle) - y * np.cos(angle) + bend) / unit
    waves = strands(rng, phase / 5 + 0.35 * noise(rng, shape, 18 * unit)) + 0.4 * noise(rng, shape, 5 * unit)
    gaps = ramp(noise(rng, shape, 30 * unit, 9 * unit, angle), 0.9, 1.5)
    dy, dx = np.gradient(phase)
    points = scatter(rng, shape, 11 * unit, keep=0.5)
    turn = np.arctan2(sample_field(dx, points), -sample_field(dy, points)) + rng.normal(0, 0.15, len(points))
    nuclei = stamp(shape, points, rng.uniform(3.5, 5.5, len(points)) * unit, 1.2 * unit, turn)
    return 0.08 + 0.9 * nuclei, (0.5 + 0.2 * waves) * (1 - gaps) + 0.05


def _tumour(rng: np.random.Generator, shape: _Shape, unit: float) -> _Stains:
    """Adenocarcinoma epithelium: large crowded nuclei of uneven size and direction around slits of lumen."""
    fold = noise(rng, shape, rng.uniform(20, 30) * unit)
    width = np.minimum(0.3 * noise(rng, shape, 35 * unit), 0.6)
    slit = ramp(width - np.abs(fold), 0, 0.12)
    points = scatter(rng, shape, rng.uniform(8.5, 9.8) * unit, 0.17)
    points = points[sample_field(slit, points) < 0.3]
    dy, dx = np.gradient(fold)
    turn = np.arctan2(sample_field(dy, points), sample_field(dx, points)) + rng.normal(0, 0.4, len(points))
    long = np.clip(np.exp(rng.normal(1.5, 0.2, len(points))), 2.5, 7) * unit
    nuclei = stamp(
        shape, points, long, long * rng.uniform(0.55, 0.85, len(points)), turn, rng.uniform(0.6, 1, len(points))
    )
    chromatin = 1 + 0.3 * noise(rng, shape, 1.8 * unit)
    return (0.12 + 0.9 * nuclei * chromatin) * (1 - slit), (0.5 + 0.1 * nuclei) * (1 - slit)


_PAINTERS: dict[str, Callable[[np.random.Generator, _Shape, float], _Stains]] = {
    "ADI": _adipose,
    "BACK": _background,
    "DEB": _debris,
    "LYM": _lymphocytes,
    "MUC": _mucus,
    "MUS": _muscle,
    "NORM": _normal,
    "STR": _stroma,
    "TUM": _tumour,
}
CLASSES = tuple(_PAINTERS)


def draw_tile(label: str, seed: int, size: int = 96, look: Look = PLAIN) -> Image:
    """One tile of class ``label``: uint8 (size, size, 3), RGB; a pure function of its arguments.

    Any ``size`` shows the same field of view, about 112 micrometres as in NCT-CRC-HE, at another resolution. ``look``
    is the slide's, about which the tile's own colours are drawn.

    Raises:
        InputError: an unknown class, a negative seed, or fewer than 16 pixels.
    """
    if label not in _PAINTERS:
        raise InputError(f"made-up tissue: no class {label!r}; give one of {', '.join(CLASSES)}")
    if seed < 0 or size < 16:
        raise InputError(f"made-up tissue: seed={seed}, size={size}; give seed >= 0 and size >= 16")
    rng = _random(seed, CLASSES.index(label), size)
    unit = size / _FIELD_OF_VIEW
    return stain(rng, *_PAINTERS[label](rng, (size, size), unit), unit, look)


def write_tissue(
    root: Path, tiles_per_class: int, size: int = 96, seed: int = 0, suffix: str = ".png", slides: int = 0
) -> Path:
    """Write ``<root>/<CLASS>/<CLASS>-XXXXXXXX<suffix>``, nine classes of ``tiles_per_class`` tiles.

    The same arguments give the same bytes; two seeds share no tile and, but for a chance below 1 in 10^6 for 100 tiles
    a class, no name.

    Args:
        root: a folder that does not exist yet or is empty; it appears complete or not at all.
        suffix: ``.tif`` (uncompressed, as NCT-CRC-HE), ``.png``, ``.bmp``, ``.webp`` (lossless), ``.jpg`` (quality 95).
        slides: number of slides that the tiles of every class are dealt to in turn, each of its own stains and light,
            whose names begin the files' (``S1004-``); no two seeds share one. 0: no slides, one look.

    Raises:
        InputError: a bad number, size or suffix, or ``root`` is not empty.
    """
    if tiles_per_class < 1 or seed < 0:
        raise InputError(f"made-up tissue: tiles_per_class={tiles_per_class}, seed={seed}; give >= 1 and >= 0")
    if not 0 <= slides <= _MOST_SLIDES:
        raise InputError(f"made-up tissue: slides={slides}; give 0 to {_MOST_SLIDES}")
    if suffix not in _SUFFIXES:
        raise InputError(f"made-up tissue: suffix={suffix!r}; give one of {', '.join(_SUFFIXES)}")
    names = [f"S{seed * _MOST_SLIDES + number:04d}-" for number in range(slides)] or [""]
    looks = [draw_look(_random(seed, number)) for number in range(slides)] or [PLAIN]
    with fresh_folder(Path(root)) as folder:
        for label in CLASSES:
            (folder / label).mkdir()
            for number in range(tiles_per_class):
                slide = number % len(looks)
                tile = PILImage.fromarray(draw_tile(label, (seed << 32) + number, size, looks[slide]))
                name = f"{names[slide]}{_name(label, seed, number)}{suffix}"
                tile.save(folder / label / name, quality=95, lossless=True)
    return Path(root)


def _random(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def _name(label: str, seed: int, number: int) -> str:
    """``CLASS-XXXXXXXX``: eight letters, distinct for every number of a class and seed."""
    start = int.from_bytes(hashlib.blake2b(f"{label} {seed}".encode(), digest_size=8).digest(), "big")
    code = (start + number * 79_766_443_077) % 26**8  # odd and not a multiple of 13: a bijection modulo 26^8
    letters = [chr(ord("A") + code // 26**place % 26) for place in range(8)]
    return f"{label}-{''.join(letters)}"
