"""Index and manifest of a shard folder.

The index is an Arrow IPC file with one record batch a shard, so that it is mapped and not read: opening it costs the
same for 10^3 and for 10^8 samples, and a lane touches only the pages of its own shards.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from annotated_types import Ge, Len

from ca2cl.common.files import file_digest
from ca2cl.common.records import Count, parse_record, read_record
from ca2cl.data.decode import MAX_PIXELS
from ca2cl.data.shards.samples import ShardInfo, ShardSamples
from ca2cl.errors import InputError

INDEX_NAME = "index.arrow"
MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_SHARDS_KEY = b"ca2cl.shards"
_SUMS_KEY = b"ca2cl.checksums"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.tar")
_RECENT_SHARDS = 256
_AGAIN = "write the folder again with `ca2cl shard`"
_ROW_BYTES = 20  # at least: offset, size and label are not compressed
_DAMAGE = (pa.ArrowException, OSError, KeyError, TypeError, ValueError, OverflowError)
_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("ext", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("label", pa.int32()),
        ("group", pa.string()),
    ]
)


@dataclass(frozen=True)
class Manifest:
    """Identity of a set of shards: written once, compared when an encoder and its data meet again."""

    schema_version: Annotated[int, Ge(1)]
    classes: list[str]
    """Class names in label order; empty for unlabelled tiles."""
    counts: dict[str, Count]
    """Samples by class."""
    tile_size: Annotated[list[Annotated[int, Ge(1)]], Len(2, 2)]
    """Height and width in pixels of every tile."""
    source: str
    """Name of the source: a folder's, or ``hf:NAME``."""
    encode: str
    """keep, or the format that the tiles were re-encoded in."""
    samples: Count
    shards: Count
    bytes: Count
    """Size of all tars together."""
    digest: str
    """SHA-256 over classes, tile size and every shard's digest: the identity of the data."""

    def __post_init__(self) -> None:
        if math.prod(self.tile_size) > MAX_PIXELS:
            raise ValueError(f"tile_size is {self.tile_size}, more than {MAX_PIXELS} pixels")


def digest_of(classes: Sequence[str], tile_size: Sequence[int], shards: Sequence[ShardInfo]) -> str:
    """The identity of a set of shards: SHA-256 as 64 hexadecimal digits."""
    content = {"classes": list(classes), "tile_size": list(tile_size), "shards": [(s.name, s.sha256) for s in shards]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ShardIndex:
    """A read-only view of a shard folder's index and manifest.

    Args:
        root: the folder that ``ca2cl shard`` wrote, or a cache with its index and manifest and some of its tars. Tars
            that are there must have their size; ``verify`` also checks that all are there.
        classes: the list that labels are numbers in, with all of the manifest's classes; by default that of the
            manifest.

    Raises:
        InputError: the folder, its index or its manifest is missing, damaged, of a newer schema, or they disagree; a
            tar is truncated.
    """

    def __init__(self, root: str | Path, classes: list[str] | None = None) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root / MANIFEST_NAME)
        self._classes = classes
        path = self._path = self.root / INDEX_NAME
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = self._reader.schema.metadata
            self.shards = parse_record(metadata[_SHARDS_KEY], list[ShardInfo], path, _AGAIN)
            self._sums = parse_record(metadata[_SUMS_KEY], list[int], path, _AGAIN)
            if not self._reader.schema.equals(_SCHEMA):
                raise ValueError("other columns")
            self._check()
        except FileNotFoundError:
            raise InputError(f"{path}: no index here; {_AGAIN}") from None
        except InputError:
            raise
        except _DAMAGE as error:
            raise self._damaged(error) from None
        self.keep(_RECENT_SHARDS)
        self._check_sizes(missing_too=False)
        self.starts = np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])

    def __reduce__(self) -> tuple[Any, ...]:
        return ShardIndex, (self.root, self.classes)  # mapped again by the process that unpickles it

    def relabelled(self, classes: list[str]) -> ShardIndex:
        """The same shards with their labels as numbers in ``classes``, which holds all of theirs, in any order."""
        return self if classes == self.classes else ShardIndex(self.root, classes)

    def _damaged(self, reason: object) -> InputError:
        short = " ".join(str(reason).split())[:200]
        return InputError(f"{self._path}: damaged index ({short}); {_AGAIN}")

    def _check(self) -> None:
        """Compare the index with the manifest, and its counts with its size: memory is allocated by them later."""
        manifest, shards, size = self.manifest, self.shards, self._path.stat().st_size
        expected = digest_of(manifest.classes, manifest.tile_size, shards)
        if not self._reader.num_record_batches == len(shards) == len(self._sums) or expected != manifest.digest:
            raise InputError(f"{self._path}: does not match {MANIFEST_NAME}; {_AGAIN}")
        for shard in shards:
            if not _SHARD_NAME.fullmatch(shard.name):
                raise InputError(f"{self._path}: shard {shard.name!r} is no tar in this folder; {_AGAIN}")
        samples = sum(shard.samples for shard in shards)
        counts = (samples, len(shards), sum(shard.bytes for shard in shards))
        if counts != (manifest.samples, manifest.shards, manifest.bytes):
            raise ValueError(f"other counts than in {MANIFEST_NAME}")
        if samples * _ROW_BYTES > size:
            raise ValueError(f"{samples} samples in {size} bytes")

    def _check_sizes(self, missing_too: bool) -> None:
        with os.scandir(self.root) as entries:  # one listing: a stat by path for each of 10^5 tars takes seconds
            tars = (entry for entry in entries if entry.name.endswith(".tar") and entry.is_file())
            sizes = {entry.name: entry.stat().st_size for entry in tars if not entry.name.startswith(".")}
        for shard in self.shards:
            found = sizes.get(shard.name)
            path = f"{self.root}/{shard.name}"
            if found is None and missing_too:
                raise InputError(f"{path}: shard missing; {_AGAIN}")
            if found is not None and found != shard.bytes:
                kind = "truncated tar" if found < shard.bytes else "tar that does not match its index"
                raise InputError(f"{path}: {kind}, {found} bytes instead of {shard.bytes}; copy or write it again")

    def verify(self, shard: int | None = None) -> None:
        """Check that every tar is there with its size, and read shard number ``shard`` through against its SHA-256.

        Raises:
            InputError: a tar is missing, truncated, or holds other bytes than its index says.
        """
        self._check_sizes(missing_too=True)
        if shard is None:
            return
        info = self.shards[shard]
        if file_digest(self.root / info.name) != info.sha256:
            raise InputError(f"{self.root / info.name}: does not match its index; copy or write it again")

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return int(self.starts[-1])

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return self._classes or self.manifest.classes

    def samples(self, shard: int) -> ShardSamples:
        """The samples of shard number ``shard``; arrays are views of the mapped file.

        Raises:
            InputError: the shard's part of the index is damaged.
        """
        return self._recent(shard)

    def keep(self, shards: int) -> None:
        """Hold the samples of the ``shards`` last used in memory, or of 256 if that is more."""
        self._recent = lru_cache(max(shards, _RECENT_SHARDS))(self._read)

    def _read(self, shard: int) -> ShardSamples:
        try:
            batch = self._reader.get_batch(shard)
            batch.validate(full=True)  # string offsets are followed without a check otherwise
            return self._checked(shard, batch)
        except _DAMAGE as error:
            raise self._damaged(f"shard {shard}: {error}") from None

    def _checked(self, shard: int, batch: pa.RecordBatch) -> ShardSamples:
        info = self.shards[shard]
        column = {name: batch.column(name) for name in _SCHEMA.names}
        if batch.num_rows != info.samples or _checksum(batch) != self._sums[shard]:
            raise ValueError("checksum differs")
        samples = ShardSamples(
            key=_LazyStrings(column["key"]),
            ext=_LazyStrings(column["ext"]),
            group=_LazyStrings(column["group"]),
            offset=_numbers(column["offset"]),
            size=_numbers(column["size"]),
            label=_numbers(column["label"]),
        )
        if not len(samples):
            return samples
        ends = samples.offset + samples.size
        if samples.offset.min() < 0 or samples.size.min() < 0 or ends.max() > info.bytes:
            raise ValueError("a tile lies outside its tar")
        if samples.label.min() < -1 or samples.label.max() >= len(self.manifest.classes):
            raise ValueError("a label has no class")
        numbers = [*(self.classes.index(name) for name in self.manifest.classes), -1]  # the last one is that of -1
        return replace(samples, label=np.array(numbers, np.int32)[samples.label])

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard number and row in it of sample number ``sample`` (in index order)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def labels(self) -> npt.NDArray[np.int64]:
        """Label of every sample in index order, shape (N,)."""
        parts = [self.samples(shard).label for shard in range(len(self.shards))]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def groups(self) -> list[str | None]:
        """The slide or patient of every sample in index order, None where it has none."""
        return [group for samples in self for group in samples.group]

    def slides(self) -> tuple[npt.NDArray[np.int32], int]:
        """Numbers of the slides or patients of all samples in index order, (N,), and how many there are.

        Numbers are in the order of first appearance, and -1 where a sample has none. It is one pass over the index, of
        80 CPU ns a sample.
        """
        try:
            columns = [self._reader.get_batch(shard).column("group") for shard in range(len(self.shards))]
            for column in columns:
                column.validate(full=True)
            parts = pa.chunked_array(columns, pa.string()).dictionary_encode().chunks
            numbers = [_numbers(part.indices.fill_null(-1)) for part in parts]
        except _DAMAGE as error:
            raise self._damaged(error) from None
        return np.concatenate([np.zeros(0, np.int32), *numbers]), len(parts[0].dictionary) if parts else 0

    def has_slides(self) -> bool:
        """True if any sample has a slide or patient; looks no further than the first shard with one."""
        shards = (self._reader.get_batch(shard).column("group") for shard in range(len(self.shards)))
        return any(column.null_count < len(column) for column in shards)

    def __iter__(self) -> Iterator[ShardSamples]:
        return (self.samples(shard) for shard in range(len(self.shards)))


class _LazyStrings(Sequence[Any]):
    """Strings of an Arrow column, made into Python objects one at a time."""

    def __init__(self, column: pa.Array) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return self._column[row].to_pylist()
        return self._column[int(row)].as_py()


def _numbers(column: pa.Array) -> npt.NDArray[Any]:
    """A column of integers as a view of its memory. Its own ``to_numpy`` imports pandas, which takes half a second.

    Raises:
        pa.ArrowTypeError: a value is missing.
    """
    return np.from_dlpack(column)


def _checksum(batch: pa.RecordBatch) -> int:
    """CRC-32 of the rows' values, whatever buffers they lie in."""
    total = 0
    for field, column in zip(_SCHEMA, batch.columns, strict=True):
        if pa.types.is_string(field.type):
            values = json.dumps(column.to_pylist()).encode()
        else:
            values = _numbers(column).tobytes()
        total = zlib.crc32(values, total)
    return total


def _record_batch(samples: ShardSamples) -> pa.RecordBatch:
    return pa.record_batch([_column(getattr(samples, f.name), f.type) for f in _SCHEMA], schema=_SCHEMA)


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if pa.types.is_string(kind):
        return _strings(list(values))
    numbers = np.ascontiguousarray(values, f"i{kind.byte_width}")
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(numbers)])


def _strings(values: Sequence[str | None]) -> pa.Array:
    """Strings as an Arrow column. ``pa.array`` imports pandas, which takes half a second."""
    encoded = [(value or "").encode() for value in values]
    offsets = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    present = [value is not None for value in values]
    bits = None if all(present) else pa.py_buffer(np.packbits(present, bitorder="little"))
    return pa.StringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)), bits)


def write_index(file: Path | BinaryIO, parts: Iterable[tuple[ShardInfo, ShardSamples]]) -> None:
    """Write the index of ``parts``, one record batch a shard (not atomic: the caller renames).

    ``parts`` is iterated over twice, one part at a time: it may read each from disk. Arrow arrays of the index's types
    are taken as they are, so that an index of 10^8 samples is written in minutes.
    """
    listed, sums = [], []
    for info, samples in parts:
        listed.append(asdict(info))
        sums.append(_checksum(_record_batch(samples)))
    metadata = {_SHARDS_KEY: json.dumps(listed).encode(), _SUMS_KEY: json.dumps(sums).encode()}
    with pa.ipc.new_file(file, _SCHEMA.with_metadata(metadata)) as writer:
        for _, samples in parts:
            writer.write_batch(_record_batch(samples))


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: missing, not JSON, wrong fields, or a newer schema than this version knows.
    """
    absent = "no manifest here; give a folder that `ca2cl shard` wrote"
    return read_record(path, Manifest, _AGAIN, newest=SCHEMA_VERSION, absent=absent)


def key_hash(key: str) -> int:
    """A stable signed 64-bit hash of a sample key: the identity from which its views' randomness is derived."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def slide_hash(group: str | None, key: str) -> int:
    """A stable signed 64-bit hash of a tile's slide or patient; a tile without one is a slide of its own."""
    if group is None:
        return key_hash(key)
    word = hashlib.blake2b(group.encode(), digest_size=8, person=b"slide").digest()
    return int.from_bytes(word, "little", signed=True)
