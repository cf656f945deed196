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
_SAMPLES, _SAMPLE = 64, 1 << 16


class SlideError(InputError):
    """A slide that cannot be read or used. The others of a job go on."""


@dataclass(frozen=True)
class Level:
    """One level of a pyramid: its size in pixels, and level-0 pixels to one of its own."""

    width: int
    height: int
    downsample: float


class SlideReader(Protocol):
    """An open slide. ``levels[0]`` is the finest."""

    levels: tuple[Level, ...]
    mpp: float | None
    """Micrometres to a pixel of level 0, as the file states it; None where it states none."""
    magnification: float | None
    """Objective power as stated, for messages only."""
    vendor: str
    digest: str
    """``ALGORITHM:HEXADECIMAL``, the same for all files of one slide."""

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """RGB pixels (height, width, 3) of a region in this level's pixels; white outside of the slide.

        Raises:
            SlideError: the region does not decode.
        """

    def close(self) -> None: ...


def plausible_mpp(value: object) -> float | None:
    """``value`` as micrometres a pixel, or None if it is no number or that of a screen or printer, such as 72 dpi."""
    try:
        mpp = float(str(value))
    except ValueError:
        return None
    return mpp if math.isfinite(mpp) and _LEAST_MPP <= mpp <= _MOST_MPP else None


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
