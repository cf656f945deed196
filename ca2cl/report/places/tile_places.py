"""Places of tiles on their slides, as ``ca2cl shard SLIDES`` wrote them.

Legend: N tiles, S slides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import is_number
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.slides.records import without_shared_folder

Integers = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]
_UNKNOWN = -1
_NOWHERE = (math.nan,) * 4
_MOST_MICROMETRES = 1e7


@dataclass(frozen=True)
class Places:
    """Slide and position of every tile."""

    slides: list[str]
    slide_N: Integers
    """Index into ``slides``, -1 of a tile without a place."""
    boxes_N4: Numbers
    """Left, top, right and lower edge in micrometres from the slide's left upper corner; NaN without a place."""

    @cached_property
    def names(self) -> list[str]:
        """The slides' names without the folder that all of them are in, to be shown."""
        return without_shared_folder(self.slides)

    def slide(self, row: int) -> str:
        """Name of a tile's slide as it is shown; empty without a place."""
        number = int(self.slide_N[row])
        return self.names[number] if number >= 0 else ""

    def position(self, row: int) -> str:
        """Left and top in millimetres, to a hundredth; empty without a place."""
        left, top = (self.boxes_N4[row, :2] / 1000).tolist()
        return f"{left:.2f}, {top:.2f} mm" if self.slide_N[row] >= 0 else ""

    def same(self, row: int, other: int) -> bool:
        """True if both tiles are of one slide."""
        return bool(self.slide_N[row] == self.slide_N[other] != _UNKNOWN)


def read_places(index: ShardIndex, reader: ShardReader, places: Sequence[tuple[int, int]]) -> Places | None:
    """The places of tiles; None if none of them has one.

    Args:
        index: of the shards.
        reader: of the same.
        places: shard and row in it of each tile, as ``index.locate`` gives them.

    Raises:
        InputError: a shard cannot be read.
    """
    found = []
    for shard, row in places:
        held = index.samples(shard)
        name, key = index.shards[shard].name, str(held.key[row])
        about = reader.about(name, key, int(held.offset[row]), int(held.size[row]))
        found.append(_box(about, index.manifest.tile_size))
    slides = sorted({slide for slide, _ in found if slide})
    if not slides:
        return None
    numbers = {slide: number for number, slide in enumerate(slides)}
    return Places(
        slides,
        np.array([numbers.get(slide, _UNKNOWN) for slide, _ in found], np.int64),
        np.array([box for _, box in found], np.float64),
    )


def _box(about: Mapping[str, Any], tile_size: Sequence[int]) -> tuple[str, tuple[float, ...]]:
    """Slide and box of a tile by its ``.json``; an empty name if that has no place."""
    slide, (height, width) = about.get("slide"), tile_size
    x, y, mpp, slide_mpp = (_number(about.get(name)) for name in ("x", "y", "mpp", "slide_mpp"))
    left, top = x * slide_mpp, y * slide_mpp
    box = left, top, left + width * mpp, top + height * mpp
    known = mpp > 0 and slide_mpp > 0 and all(0 <= edge < _MOST_MICROMETRES for edge in box)
    return (slide, box) if known and isinstance(slide, str) else ("", _NOWHERE)


def _number(value: object) -> float:
    """``value`` as a float, NaN if it is no number."""
    return float(value) if is_number(value) and isinstance(value, int | float) else math.nan


def share_by_chance(groups_N: Integers) -> float | None:
    """Expected share of a tile's own group (0 and up) among neighbours drawn at random, over all tiles of groups."""
    counts = np.bincount(groups_N[groups_N >= 0]).astype(np.float64)
    total = counts.sum()
    if total < 2:
        return None
    return float((counts * (counts - 1)).sum() / (total * (total - 1)))
