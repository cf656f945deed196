"""Tiles by number, from shards or a plain source, and their decoding.

Legend: R tiles of a range, H, W height and width in pixels, S side of the encoder's input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.data.decode import BadSample, decode
from ca2cl.data.loading.stream import BadTile, SampleSource, UndecodableError
from ca2cl.data.loading.workers import Pixels
from ca2cl.data.orientation import orientation_of
from ca2cl.data.remote.reader import ShardReader, is_remote, open_index
from ca2cl.data.shards.index import INDEX_NAME
from ca2cl.data.shards.writer import check_pixels, image_size
from ca2cl.data.sources.base import Content, Source, SourceOptions, Tile
from ca2cl.data.sources.choose import is_source, not_there, open_source
from ca2cl.data.sources.names import is_clutter, shown
from ca2cl.errors import InputError
from ca2cl.slides.readers.base import SlideError

Prepare = Callable[[Tensor], Tensor]
"""uint8 tiles (B, H, W, 3) → the encoder's input, float32 (B, 3, S, S)."""

_SIZED_TILES = 32
_LARGEST_USUAL = 1024 * 1024
"""Pixels of a tile above which a whole batch at full size would be too much memory."""


class TilePlace(NamedTuple):
    """Columns of a slide's tile: where it lies."""

    slide: str
    """The slide's name."""
    patient: str | None
    x: int
    """Of the left upper corner, in level-0 pixels."""
    y: int
    mpp: float
    """Micrometres a pixel of the tile."""
    side: float
    """Of the tile, in level-0 pixels."""


class TileRow(NamedTuple):
    """Columns of a tile beside its vector."""

    key: str
    """Its key: in a plain folder, or of a slide, the one that ``ca2cl shard`` would give it."""
    label: str | None
    """Name of its class."""
    source: str
    """The file that it lies in: its shard's name, its path below the folder, or the slide's file."""
    place: TilePlace | None = None
    """Of a slide's tile."""


class BlurredTile(Exception):
    """A tile of a slide that is left out because it is not sharp."""


class TileData(Protocol):
    """Tiles numbered 0, 1, ... in input order; goes to the decoding processes by fork."""

    name: str
    digest: str
    """Changes when any tile does."""
    manifest_digest: str | None
    classes: list[str]
    tile_size: tuple[int, int]
    """H and W of most tiles."""
    turned: int
    """Tiles filled so far, in this process, that say that they are to be shown turned (``data.orientation``)."""

    def __len__(self) -> int: ...

    def fill(self, number: int, out_HWC: Pixels) -> tuple[TileRow, Pixels | None]:
        """Decode tile ``number`` into ``out_HWC``, or return its pixels where it is of another size.

        Raises:
            UndecodableError: it is no tile.
            BlurredTile: it is one that is not wanted.
            SlideError: its slide cannot be read.
            InputError: its file cannot be read.
        """

    def group(self, number: int) -> str | None:
        """Slide or patient of a tile of shards; None where it is not known or stands in ``TileRow.place``."""


def open_tiles(source: str, cache_dir: str | None, options: SourceOptions) -> TileData:
    """List ``source``: shards, a folder of images, a saved dataset or hf:NAME.

    Raises:
        InputError: missing, empty or damaged.
    """
    root = Path(source)
    if is_remote(source):
        if cache_dir is None:
            raise InputError(f"cache_dir is none: {source} is remote; give a local folder with --cache_dir")
        return ShardTiles(source, cache_dir)
    if not is_source(source):
        raise not_there(source, "shards, a folder of images, a saved dataset, hf:NAME, or slides with --mpp")
    if (root / INDEX_NAME).exists() or (
        root.is_dir() and any(not is_clutter(path.name) for path in root.glob("*.tar"))
    ):
        return ShardTiles(source, cache_dir)
    return SourceTiles(open_source(source, options, mixed=True))


class ShardTiles:
    """Tiles of shards, in index order; one of another size than the manifest's is a bad one, as everywhere."""

    turned = 0  # `ca2cl shard` has warned about them

    def __init__(self, root: str, cache_dir: str | None) -> None:
        self._index = open_index(root, cache_dir)
        self._source = SampleSource(self._index, ShardReader(root, cache_dir, index=self._index))
        manifest = self._index.manifest
        self.name, self.classes = manifest.source, manifest.classes
        self.digest = manifest.digest
        self.manifest_digest: str | None = manifest.digest
        self.tile_size = self._source.tile_size
        if not len(self):
            raise InputError(f"{root}: the shards hold no tiles; shard a folder that does")

    def __len__(self) -> int:
        return len(self._index)

    def fill(self, number: int, out_HWC: Pixels) -> tuple[TileRow, Pixels | None]:
        """See ``TileData``."""
        key, label, _ = self._source.fill(number, out_HWC)
        shard = self._index.shards[self._index.locate(number)[0]].name
        return TileRow(key, self.classes[label] if label >= 0 else None, shard), None

    def group(self, number: int) -> str | None:
        """See ``TileData``."""
        shard, row = self._index.locate(number)
        return self._index.samples(shard).group[row]


class SourceTiles:
    """Tiles of a folder in sorted order of their paths (or a dataset's rows), of whatever sizes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.name, self.digest = source.name, source.digest
        self.manifest_digest: str | None = None
        self.classes = [shown(name) for name in source.classes]
        self.tile_size = _usual_size(source)
        self.turned = 0

    def __len__(self) -> int:
        return len(self._source)

    def fill(self, number: int, out_HWC: Pixels) -> tuple[TileRow, Pixels | None]:
        """See ``TileData``."""
        (tile,) = self._source.tiles([number])
        try:
            content = self._read(tile)
            pixels = decode(content) if isinstance(content, bytes) else check_pixels(content, tile.name)
        except BadSample as error:
            raise UndecodableError(BadTile(tile.key, str(error))) from None
        self.turned += isinstance(content, bytes) and orientation_of(content) != 1
        row = TileRow(tile.key, self.classes[tile.label] if tile.label >= 0 else None, shown(tile.name))
        if pixels.shape != out_HWC.shape:
            return row, pixels
        out_HWC[...] = pixels
        return row, None

    def group(self, number: int) -> str | None:
        """See ``TileData``."""
        return None

    def _read(self, tile: Tile) -> Content:
        try:
            return self._source.reader.read(tile)
        except InputError as error:
            reason = str(error).partition(";")[0]
            # A disk that is away for a moment must not leave holes in the result; a row without an image is one.
            if isinstance(error.__context__, OSError):
                raise InputError(f"{reason}; restore it and run again: finished parts are kept") from None
            raise BadSample(reason) from None


def _usual_size(source: Source) -> tuple[int, int]:
    """Most frequent H and W of the first tiles; 1 x 1, which none has, where these are too large to be batched."""
    sizes: Counter[tuple[int, int]] = Counter()
    for tile in source.tiles(range(min(_SIZED_TILES, len(source)))):
        with suppress(InputError):  # a bad tile is met again when it is decoded
            sizes[image_size(source.reader.read(tile), source.reader.where(tile))] += 1
    height, width = max(sizes, key=lambda size: sizes[size]) if sizes else (1, 1)
    return (height, width) if height * width <= _LARGEST_USUAL else (1, 1)


@dataclass(frozen=True)
class Decoded:
    """The good tiles of a range, which fill the first rows of its batch, and the bad ones."""

    rows: list[TileRow]
    bad: list[BadTile]
    resized: dict[int, npt.NDArray[np.float32]]
    """Of tiles of another size than usual: place among the good ones → the encoder's input (3, S, S)."""
    turned: int = 0
    """Good tiles that say that they are to be shown turned."""
    blurred: int = 0
    """Tiles of a slide that were left out as blurred."""
    failed: str | None = None
    """Why the slide cannot be read; the rest of the range was left out then."""


class DecodeRange:
    """Decodes the tiles first, ..., last - 1 of a request (first, last)."""

    def __init__(self, data: TileData, prepare: Prepare) -> None:
        self._data, self._prepare = data, prepare

    def rows(self, request: tuple[int, int]) -> int:
        """R."""
        return request[1] - request[0]

    def __call__(self, request: tuple[int, int], tiles_RHWC: Pixels) -> Decoded:
        """Fill the first rows of ``tiles_RHWC`` with the good tiles, in order."""
        decoded = Decoded([], [], {})
        before = self._data.turned
        blurred, failed = 0, None
        for number in range(*request):
            place = len(decoded.rows)
            try:
                row, other_HWC = self._data.fill(number, tiles_RHWC[place])
            except UndecodableError as failure:
                decoded.bad.append(failure.tile)
                continue
            except BlurredTile:
                blurred += 1
                continue
            except SlideError as error:
                failed = str(error)
                break
            decoded.rows.append(row)
            if other_HWC is not None:  # as an array: a tensor would go through the small /dev/shm of a container
                decoded.resized[place] = self._prepare(torch.from_numpy(other_HWC)[None])[0].contiguous().numpy()
        return replace(decoded, turned=self._data.turned - before, blurred=blurred, failed=failed)
