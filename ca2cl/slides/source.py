"""Tiles that were cut from slides, as a source of shards."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ca2cl.data.encode import EXTENSIONS
from ca2cl.data.sources.base import Tile, TileReader, safe_key
from ca2cl.errors import InputError
from ca2cl.slides.records import SlideRecord
from ca2cl.slides.staging import Staging


class SlideSource:
    """Cut tiles, slide by slide in the order of their list."""

    def __init__(
        self, name: str, digest: str, records: list[SlideRecord], staging: Staging, mpp: float, form: str
    ) -> None:
        self.name, self.digest = name, digest
        self.ungrouped: list[int] = []
        self._records, self._mpp, self._ext = records, mpp, EXTENSIONS[form]
        scans = (staging.read_scan(number) for number in range(len(records)))
        self.classes = sorted({name for scan in scans if scan is not None for name in scan.classes})
        if not staging.tiles_path.exists():
            parts = staging.table_parts(len(records), tuple(self.classes))
            staging.write_tiles(parts, sum(record.kept for record in records))
        self._table: npt.NDArray[Any] = np.load(staging.tiles_path, mmap_mode="r")
        self.labels = np.ascontiguousarray(self._table["label"])
        self.reader: TileReader = StagedReader(str(staging.folder))

    def __len__(self) -> int:
        return len(self._table)

    def tiles(self, rows: Iterable[int]) -> list[Tile]:
        """The tiles with these numbers."""
        return [self._tile(int(row)) for row in rows]

    def _tile(self, row: int) -> Tile:
        found = self._table[row]
        record = self._records[found["slide"]]
        x, y = int(found["x"]), int(found["y"])
        assert record.mpp is not None and record.level is not None
        meta: dict[str, str | int | float] = {
            "slide": record.slide, "x": x, "y": y, "mpp": self._mpp, "slide_mpp": record.mpp, "level": record.level,
        }  # fmt: skip
        if record.patient is not None:
            meta["patient"] = record.patient
        return Tile(
            key=tile_key(record.slide, x, y),
            name=f"{record.slide}[{x},{y}]",
            row=row,
            label=int(found["label"]),
            group=record.patient or record.slide,
            ext=self._ext,
            meta=meta,
        )


def tile_key(slide: str, x: int, y: int) -> str:
    """Key of a tile.

    Args:
        slide: the slide's name.
        x, y: left upper corner in level-0 pixels.
    """
    return safe_key(f"{slide}_x{x}_y{y}")


class StagedReader:
    """Reads encoded tiles from a job's staging folder."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    @cached_property
    def _table(self) -> npt.NDArray[Any]:
        table: npt.NDArray[Any] = np.load(Staging(Path(self.folder)).tiles_path, mmap_mode="r")
        return table

    def where(self, tile: Tile) -> str:
        """The slide and the tile's corner."""
        return tile.name

    def read(self, tile: Tile) -> bytes:
        """The encoded tile.

        Raises:
            InputError: its file is gone or damaged.
        """
        found = self._table[tile.row]
        slide, piece, size = int(found["slide"]), int(found["piece"]), int(found["size"])
        try:
            file = _opened(self.folder, slide, piece)
            file.seek(int(found["offset"]))
            data = file.read(size)
        except OSError as error:
            path = _path(self.folder, slide, piece)
            raise InputError(f"{path}: cannot be read ({error.strerror}); run again with an empty folder") from None
        if len(data) != size:
            path = _path(self.folder, slide, piece)
            raise InputError(f"{path}: ends early; run again with an empty folder")
        return data


def _path(folder: str, slide: int, piece: int) -> Path:
    return Staging(Path(folder)).bin_path(slide, piece)


@lru_cache(maxsize=128)
def _opened(folder: str, slide: int, piece: int) -> BinaryIO:
    """Files stay open for the next tiles: a shard has tiles of many slides."""
    return _path(folder, slide, piece).open("rb", buffering=0)
