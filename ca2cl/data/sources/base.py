"""Protocol of a tile source.

A source is listed once, in the parent process. The writing processes get its ``reader`` (small, picklable) and the
tiles of one shard at a time, so that a listing of 10^8 files is never copied. A new source is a class with this
form in a module of its own, and a line in ``choose.KINDS``; one outside this package is named on the command line as
``module:Class:WHERE``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

_PLAIN = re.compile(r"[A-Za-z0-9_/-]*")
Content = bytes | npt.NDArray[np.uint8]
"""A tile as its source has it: an encoded image, or RGB pixels (H, W, 3)."""


@dataclass(frozen=True)
class Tile:
    """One tile of a source, not yet read."""

    key: str
    """Its name in the shard: unique in the source, without dots and slashes."""
    name: str
    """How users find it: the path below the source folder, or ``split[row]``."""
    row: int
    """Its number in the source's own order."""
    label: int
    """Index into the source's classes, -1 where there is none."""
    group: str | None
    """Slide or patient."""
    ext: str | None
    """Lower-case extension without dot; None where only the bytes tell."""
    meta: Mapping[str, str | int | float] = field(default_factory=dict)
    """More facts about it, such as x, y, level and mpp of a slide's tile; goes into the shard's ``.json``."""


class TileReader(Protocol):
    """Reads tiles; goes to the writing processes."""

    def read(self, tile: Tile) -> Content:
        """The tile's bytes as they are stored, or its pixels. InputError if they cannot be read."""

    def where(self, tile: Tile) -> str:
        """The tile's full name for error messages."""


class Source(Protocol):
    """A listed source: ``labels`` (N,) int32 indexes ``classes``; ``digest`` changes when any tile does; ``ungrouped``
    holds the numbers of the tiles without a slide or patient where these were asked for."""

    name: str
    classes: list[str]
    labels: npt.NDArray[np.int32]
    digest: str
    ungrouped: list[int]
    reader: TileReader

    def __len__(self) -> int: ...

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these numbers."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """Options of a source; ``ShardConfig`` explains the fields."""

    unlabelled: bool = False
    check_classes: bool = True
    group_pattern: str | None = None
    split: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    group_column: str | None = None


def safe_key(name: str) -> str:
    """``name`` as a WebDataset key, one to one: ``/`` becomes ``~``, anything but letters, digits, ``_ -`` is ``%XX``.

    Stock readers cut a member's name at the first dot of its last component, so no dot may stay in a key.
    """
    if _PLAIN.fullmatch(name):
        return name.replace("/", "~")
    parts = (quote(os.fsencode(part), safe="").replace("~", "%7E").replace(".", "%2E") for part in name.split("/"))
    return "~".join(parts)
