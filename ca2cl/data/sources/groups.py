"""Slides or patients of tiles from a CSV of keys."""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ca2cl.data.sources.base import Source, Tile, TileReader
from ca2cl.data.sources.names import shown
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)
_CHUNK = 10_000


class RegroupedSource:
    """A source whose tiles have the groups of a CSV; a tile that is not in it keeps its own.

    Args:
        source: the tiles.
        path: of a CSV with the columns ``key`` and ``group``, as ``ca2cl doctor --leaks`` writes it.

    Raises:
        InputError: the file cannot be read, has other columns, or names no tile of the source.
    """

    def __init__(self, source: Source, path: str) -> None:
        self._source, self._groups = source, _read(path)
        self.name, self.classes = source.name, source.classes
        self.labels: npt.NDArray[np.int32] = source.labels
        self.reader: TileReader = source.reader
        self.digest = hashlib.sha256(repr((source.digest, sorted(self._groups.items()))).encode()).hexdigest()
        known = self._known()
        if not known:
            raise InputError(f"groups is {path!r}: names no tile of {source.name}; give the file of these tiles")
        logger.info("groups of %d of %d tiles are those of %s", known, len(source), path)
        ungrouped = source.tiles(source.ungrouped)
        self.ungrouped = [tile.row for tile in ungrouped if tile.key not in self._groups]

    def _known(self) -> int:
        rows = range(len(self._source))
        chunks = (rows[first : first + _CHUNK] for first in range(0, len(rows), _CHUNK))
        return sum(tile.key in self._groups for chunk in chunks for tile in self._source.tiles(chunk))

    def __len__(self) -> int:
        return len(self._source)

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these numbers."""
        return [replace(t, group=self._groups.get(t.key, t.group)) for t in self._source.tiles(rows)]


def _read(path: str) -> dict[str, str]:
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"key", "group"} <= set(reader.fieldnames or ()):
                raise InputError(f"groups is {path!r}: has no columns key and group; give a CSV with both")
            return {row["key"]: shown(row["group"]) for row in reader if row["key"] and row["group"]}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"groups is {path!r}: cannot be read ({error}); give a CSV with key and group") from None
