"""Finished parts of an embedding, shared by processes and restarts.

A part holds the vectors of a fixed range of tiles, whatever process made it, and says which job's it is, so that
vectors of two encoders or data sets never come into one file. Parts are Parquet whatever the result will be.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ca2cl.common.files import replacing, writing
from ca2cl.common.job_dir import JobDir
from ca2cl.common.records import parse_json
from ca2cl.data.loading.stream import BadTile
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.patch_tokens import SUFFIX, TokenGrid, token_writer
from ca2cl.evaluation.embed.tiles import TileRow

logger = logging.getLogger(__name__)

KEPT = "finished parts are kept"
REMEDY = f"free space or give another folder and run again, {KEPT}"
_PART_KEY = b"ca2cl.part"
_DAMAGE = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)
# A few MB of floats that look like noise: compressing them costs time and gains nothing.
_PARQUET: dict[str, Any] = {"use_dictionary": ["label", "source"], "write_statistics": ["key", "label", "source"]}


class Part(NamedTuple):
    """Tiles first, ..., last - 1 in input order."""

    number: int
    first: int
    last: int


class PartFacts(NamedTuple):
    """Metadata of a part's file."""

    rows: int
    """Vectors in it: its tiles less the bad ones."""
    bad: list[BadTile]
    turned: int
    """Tiles that say that they are to be shown turned."""


def schema(dim: int) -> pa.Schema:
    """Columns of the parts and of the Parquet result."""
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("source", pa.string(), nullable=False),
            pa.field("vector", pa.list_(pa.field("element", pa.float32(), nullable=False), dim), nullable=False),
        ]
    )


def parquet_writer(file: Any, columns: pa.Schema) -> pq.ParquetWriter:
    """A writer of our Parquet files; the same rows and metadata give the same bytes."""
    return pq.ParquetWriter(file, columns, **_PARQUET)


@dataclass(frozen=True)
class Parts:
    """The parts of one job.

    Attributes:
        folder: where they lie.
        identity: all that decides the vectors, by a name that users know.
        tiles: N, in input order.
        size: tiles of a part; the last has what is left.
        dim: D, length of a vector.
        grid: patch tokens of a tile, where these are written too.
    """

    folder: Path
    identity: Mapping[str, Any]
    tiles: int
    size: int
    dim: int
    grid: TokenGrid | None = None

    @property
    def digest(self) -> str:
        """The identity as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return -(-self.tiles // self.size)

    def __getitem__(self, number: int) -> Part:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Part(number, number * self.size, min((number + 1) * self.size, self.tiles))

    def __iter__(self) -> Iterator[Part]:
        return (self[number] for number in range(len(self)))

    def path(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:06d}.parquet"

    def tokens_path(self, number: int) -> Path:
        """File of a part's patch tokens, which is written before the part."""
        return self.path(number).with_suffix(SUFFIX)

    @contextmanager
    def token_writer(self, part: Part) -> Iterator[Callable[[npt.NDArray[Any] | None], None]]:
        """A function that takes the patch tokens of a part's batches in order; without a grid it ignores them."""
        if self.grid is None:
            yield lambda tokens: None
            return
        with token_writer(self.tokens_path(part.number), REMEDY) as append:
            yield append

    def write(
        self, part: Part, rows: Sequence[TileRow], vectors_ND: npt.NDArray[np.float32], bad: list[BadTile],
        turned: int = 0,
    ) -> None:  # fmt: skip
        """Write a finished part; after any crash it is whole or absent.

        Args:
            part: which one.
            rows: its good tiles.
            vectors_ND: theirs.
            bad: tiles that did not decode.
            turned: good tiles that say that they are to be shown turned.
        """
        columns = schema(self.dim)
        facts = {"job": self.digest, "first": part.first, "last": part.last, "bad": [(b.key, b.reason) for b in bad]}
        facts["turned"] = turned
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), type=columns.field("vector").type)
        texts = [pa.array([getattr(row, name) for row in rows], pa.string()) for name in TileRow._fields]
        table = pa.table([*texts, vectors], columns.with_metadata({_PART_KEY: json.dumps(facts).encode()}))
        path = self.path(part.number)
        with writing(path, REMEDY), replacing(path) as file, parquet_writer(file, table.schema) as writer:
            writer.write_table(table)

    def facts(self, part: Part) -> PartFacts | None:
        """Metadata of a finished part, or None where it is missing, damaged or of another job."""
        path = self.path(part.number)
        if not path.exists():
            return None
        try:
            footer = pq.read_metadata(path)
            metadata = parse_json(footer.metadata[_PART_KEY])
            found = metadata["job"], metadata["first"], metadata["last"]
            bad = [BadTile(key, reason) for key, reason in metadata["bad"]]
            turned = int(metadata.get("turned", 0))
        except _DAMAGE as error:
            logger.warning("%s: damaged (%s), made again", path, " ".join(str(error).split())[:200])
            return None
        if found != (self.digest, part.first, part.last) or not self._has_tokens(part.number, footer.num_rows):
            return None
        return PartFacts(footer.num_rows, bad, turned)

    def _has_tokens(self, number: int, rows: int) -> bool:
        if self.grid is None:
            return True
        path = self.tokens_path(number)
        whole = path.exists() and path.stat().st_size == rows * self.grid.tile_bytes
        if not whole:
            logger.warning("%s: missing or cut short, made again", path)
        return whole

    def read(self, part: Part) -> pa.Table:
        """A finished part's rows.

        Raises:
            InputError: it cannot be read any more.
        """
        path = self.path(part.number)
        try:
            return pq.read_table(path, partitioning=None).cast(schema(self.dim))
        except _DAMAGE as error:
            raise InputError(
                f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); remove it and run again"
            ) from None

    @property
    def job(self) -> JobDir:
        """The folder as a job's."""
        return JobDir(
            self.folder, differences=_differences, foreign=(), setting="out", remedy=REMEDY, lock="lock",
            temporaries=("",),
        )  # fmt: skip

    def adopt(self, overwrite: bool) -> dict[int, PartFacts]:
        """Take the folder for this job, and find what a run before this one finished of it, by number.

        Raises:
            InputError: it holds another job's parts, and ``overwrite`` does not allow to throw them away.
        """
        found = list(self.folder.glob("part-*.parquet"))
        try:
            other = ", ".join(found and self.job.changes(self.identity) or [])
        except InputError:
            other = "a damaged description"
        if other and not overwrite:
            raise InputError(
                f"{self.folder}: holds parts of a job with {other}; finish that one first, give another name for out, "
                "or throw them away with --overwrite true"
            )
        if other:
            logger.warning("%s: parts of a job with %s are thrown away", self.folder, other)
            for stale in (*found, *self.folder.glob(f"part-*{SUFFIX}")):
                with writing(stale, REMEDY):
                    stale.unlink()
        self.job.write(self.identity)
        whole = ((part.number, self.facts(part)) for part in self)
        return {number: facts for number, facts in whole if facts is not None}

    def remove(self) -> None:
        """Remove the folder with all that is in it; warn about what cannot be removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            logger.warning("%s: could not be removed; it is not needed any more", self.folder)

    def remove_if_empty(self) -> None:
        """Leave no folder behind where nothing was finished."""
        if self.folder.is_dir() and not any(self.folder.glob("part-*.parquet")):
            shutil.rmtree(self.folder, ignore_errors=True)


def _differences(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted({*first, *now}) if first.get(name) != now.get(name)]
    return [f"another {', '.join(names)}"] if names else []


def mine(todo: Sequence[int], rank: int, world: int) -> list[int]:
    """The contiguous share of ``todo`` that rank ``rank`` of ``world`` takes."""
    return list(todo[rank * len(todo) // world : (rank + 1) * len(todo) // world])
