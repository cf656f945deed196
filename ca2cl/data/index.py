"""What a folder of shards holds: one Arrow index and one JSON manifest beside the tars.

The index is an Arrow IPC file with one record batch a shard, so that it is mapped and not read: opening it costs the
same for 10^3 and for 10^8 samples, and a lane touches only the pages of its own shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ca2cl.errors import InputError

INDEX_NAME = "index.arrow"
MANIFEST_NAME = "manifest.json"
SCHEMA_VERSION = 1
_SHARDS_KEY = b"ca2cl.shards"
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
class ShardInfo:
    """One tar: its file name, size in bytes, SHA-256 and number of samples."""

    name: str
    bytes: int
    sha256: str
    samples: int


@dataclass(frozen=True)
class ShardSamples:
    """The samples of one shard, in the order in which they lie in the tar.

    ``offset`` and ``size`` (bytes) locate a tile's encoded bytes inside the tar; ``label`` is an index into the
    manifest's classes, -1 where there is none; ``group`` is the slide or patient, or None.
    """

    key: Sequence[str]
    ext: Sequence[str]
    offset: npt.NDArray[np.int64]
    size: npt.NDArray[np.int64]
    label: npt.NDArray[np.int32]
    group: Sequence[str | None]

    def __len__(self) -> int:
        return len(self.offset)


@dataclass(frozen=True)
class Manifest:
    """What the shards are: written once, compared when an encoder and its data meet again."""

    schema_version: int
    classes: list[str]
    """Class names in label order; empty for unlabelled tiles."""
    counts: dict[str, int]
    """Samples by class."""
    tile_size: list[int]
    """Height and width in pixels of every tile."""
    source: str
    """What was sharded: a folder's name or ``hf:NAME``."""
    encode: str
    """keep, or the format that the tiles were re-encoded in."""
    samples: int
    shards: int
    bytes: int
    """Size of all tars together."""
    digest: str
    """SHA-256 over classes, tile size and every shard's digest: the identity of the data."""


def digest_of(classes: Sequence[str], tile_size: Sequence[int], shards: Sequence[ShardInfo]) -> str:
    """The identity of a set of shards: SHA-256 as 64 hexadecimal digits."""
    content = {"classes": list(classes), "tile_size": list(tile_size), "shards": [(s.name, s.sha256) for s in shards]}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class ShardIndex:
    """A read-only view of a shard folder's index and manifest.

    Args:
        root: the folder that ``ca2cl shard`` wrote.

    Raises:
        InputError: the folder, its index or its manifest is missing, damaged, of a newer schema, or they disagree.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root / MANIFEST_NAME)
        path = self.root / INDEX_NAME
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            listed = json.loads(self._reader.schema.metadata[_SHARDS_KEY])
            self.shards = [ShardInfo(**entry) for entry in listed]
        except FileNotFoundError:
            raise InputError(f"{path}: no index here; write the folder again with `ca2cl shard`") from None
        except (pa.ArrowInvalid, KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: damaged index ({error}); write the folder again with `ca2cl shard`") from None
        self._check(path)
        self.starts = np.concatenate([[0], np.cumsum([s.samples for s in self.shards], dtype=np.int64)])

    def _check(self, path: Path) -> None:
        expected = digest_of(self.manifest.classes, self.manifest.tile_size, self.shards)
        batches = self._reader.num_record_batches
        if batches != len(self.shards) or expected != self.manifest.digest:
            raise InputError(f"{path}: does not match {MANIFEST_NAME}; write the folder again with `ca2cl shard`")
        if any(Path(shard.name).name != shard.name for shard in self.shards):
            raise InputError(f"{path}: a shard's name leaves the folder; write the folder again with `ca2cl shard`")

    def __len__(self) -> int:
        """Number of samples in all shards."""
        return int(self.starts[-1])

    @property
    def classes(self) -> list[str]:
        """Class names in label order."""
        return self.manifest.classes

    def samples(self, shard: int) -> ShardSamples:
        """The samples of shard number ``shard``; arrays are views of the mapped file."""
        batch = self._reader.get_batch(shard)
        column = {name: batch.column(name) for name in _SCHEMA.names}
        return ShardSamples(
            key=_LazyStrings(column["key"]),
            ext=_LazyStrings(column["ext"]),
            group=_LazyStrings(column["group"]),
            offset=column["offset"].to_numpy(),
            size=column["size"].to_numpy(),
            label=column["label"].to_numpy(),
        )

    def locate(self, sample: int) -> tuple[int, int]:
        """Shard number and row in it of sample number ``sample`` (in index order)."""
        shard = int(np.searchsorted(self.starts, sample, side="right")) - 1
        return shard, sample - int(self.starts[shard])

    def labels(self) -> npt.NDArray[np.int64]:
        """Label of every sample in index order, shape (N,)."""
        parts = [self.samples(shard).label for shard in range(len(self.shards))]
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

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


def write_index(path: Path, parts: Sequence[tuple[ShardInfo, ShardSamples]]) -> None:
    """Write the index of ``parts``, one record batch a shard, to ``path`` (not atomic: the caller renames)."""
    listed = json.dumps([asdict(info) for info, _ in parts]).encode()
    schema = _SCHEMA.with_metadata({_SHARDS_KEY: listed})
    with pa.ipc.new_file(str(path), schema) as writer:
        for _, samples in parts:
            columns = [pa.array(list(getattr(samples, f.name)), type=f.type) for f in _SCHEMA]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: missing, not JSON, wrong fields, or a newer schema than this version knows.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no manifest here; give a folder that `ca2cl shard` wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error}); write the folder again with `ca2cl shard`") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("schema_version"), int):
        raise InputError(f"{path}: not a manifest of ca2cl; give a folder that `ca2cl shard` wrote")
    if raw["schema_version"] > SCHEMA_VERSION:
        raise InputError(
            f"{path}: schema {raw['schema_version']} is newer than this version's {SCHEMA_VERSION}; upgrade ca2cl"
        )
    missing = {f.name for f in fields(Manifest)} - raw.keys()
    if missing:
        raise InputError(f"{path}: lacks {', '.join(sorted(missing))}; write the folder again with `ca2cl shard`")
    return Manifest(**{f.name: raw[f.name] for f in fields(Manifest)})


def key_hash(key: str) -> int:
    """A stable signed 64-bit hash of a sample key: the identity from which its views' randomness is derived."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)
