"""Interface of a slide reader."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ca2cl.errors import InputError

Pixels = npt.NDArray[np.uint8]
WHITE = 255
_LEAST_MPP, _MOST_MPP = 0.02, 100.0
_SQUARE = 0.02
"""Greatest relative difference between width and height of a pixel."""
_SAMPLES, _SAMPLE = 64, 1 << 16


class SlideError(InputError):
    """A slide that cannot be read or used. The others of a job go on."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: its size in pixels, and level-0 pixels to one of its own."""

    width: int
    height: int
    downsample: float


class RegionReader(Protocol):
    """A slide, or a part of one."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """RGB pixels (height, width, 3) of a region in this level's pixels; white outside of the slide.

        Raises:
            SlideError: the region does not decode.
        """


class SlideReader(RegionReader, Protocol):
    """An open slide. ``levels[0]`` is the finest."""

    levels: tuple[Level, ...]
    mpp: float | None
    """Micrometres to a pixel of level 0, as the file states it; None where it states none, or pixels not square."""
    hint: str
    """What it states instead, such as its objective, for messages only; may be empty."""
    vendor: str
    digest: str
    """``ALGORITHM:HEXADECIMAL``, the same for all files of one slide."""
    bounds: tuple[int, int, int, int]
    """Left, top, right and bottom of what was scanned, in level-0 pixels."""

    def close(self) -> None: ...


def plausible_mpp(value: object) -> float | None:
    """``value`` as micrometres a pixel, or None if it is no number or that of a screen or printer, such as 72 dpi."""
    try:
        mpp = float(str(value))
    except ValueError:
        return None
    return mpp if math.isfinite(mpp) and _LEAST_MPP <= mpp <= _MOST_MPP else None


def square_mpp(across: float | None, down: float | None) -> tuple[float | None, str]:
    """The resolution of square pixels and an empty text; None, and what is stated, of others."""
    if across is None or down is None or abs(across - down) <= _SQUARE * across:
        return (across if down is not None else None), ""
    return None, f"{across:g} x {down:g} micrometres, not square"


def sampled_digest(path: Path) -> str:
    """SHA-256 of a file's size and 64 of its blocks: slides have gigabytes, and all of them would take minutes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in np.linspace(0, max(size - _SAMPLE, 0), _SAMPLES).astype(np.int64).tolist():
            file.seek(start)
            digest.update(file.read(_SAMPLE))
    return f"sampled-sha256:{digest.hexdigest()}"


def one_line(error: BaseException) -> str:
    """An exception's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
