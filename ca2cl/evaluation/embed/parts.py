"""Finished parts of an embedding, shared by processes and restarts.

A part holds the vectors of a fixed range of tiles, whatever process made it, and says which job's it is, so that
vectors of two encoders or data sets never come into one file. Parts are Parquet whatever the result will be.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
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
    turned: int = 0
    """Tiles that say that they are to be shown turned."""
    blurred: int = 0
    """Tiles of a slide that were left out as blurred."""
    failed: str | None = None
    """Why the slide of its tiles cannot be read; none of these is wanted then."""


_PLACE = [
    pa.field("slide", pa.string(), nullable=False),
    pa.field("patient", pa.string()),
    pa.field("x", pa.int32(), nullable=False),
    pa.field("y", pa.int32(), nullable=False),
    pa.field("mpp", pa.float64(), nullable=False),
    pa.field("side", pa.float64(), nullable=False),
]
"""Columns of ``TilePlace``."""


def schema(dim: int, *, placed: bool = False) -> pa.Schema:
    """Columns of the parts and of the Parquet result.

    Args:
        dim: D, length of a vector.
        placed: True for tiles of slides.
    """
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("label", pa.string()),
            pa.field("source", pa.string(), nullable=False),
            *(_PLACE if placed else []),
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
        starts: number of each slide's first tile, and of all tiles; no part has tiles of two slides. None: no slides.
    """

    folder: Path
    identity: Mapping[str, Any]
    tiles: int
    size: int
    dim: int
    grid: TokenGrid | None = None
    starts: tuple[int, ...] | None = None

    @property
    def placed(self) -> bool:
        """True for tiles of slides."""
        return self.starts is not None

    @cached_property
    def _bounds(self) -> npt.NDArray[np.int64]:
        """First tile of every part, and the number of tiles."""
        firsts = [np.arange(*pair, self.size) for pair in itertools.pairwise(self.starts or (0, self.tiles))]
        return np.concatenate([*firsts, [self.tiles]]).astype(np.int64)

    def _place(self, part: Part) -> list[int] | None:
        """The slide's number and the part's first tile in it. A slide that could not be read at first, but then can,
        moves all tiles behind it."""
        if self.starts is None:
            return None
        slide = bisect.bisect_right(self.starts, part.first) - 1
        return [slide, part.first - self.starts[slide]]

    @property
    def digest(self) -> str:
        """The identity as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(dict(self.identity), sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, number: int) -> Part:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return Part(number, int(self._bounds[number]), int(self._bounds[number + 1]))

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
        turned: int = 0, blurred: int = 0, failed: str | None = None,
    ) -> None:  # fmt: skip
        """Write a finished part; after any crash it is whole or absent.

        Args:
            part: which one.
            rows: its good tiles.
            vectors_ND: theirs.
            bad: tiles that did not decode.
            turned: good tiles that say that they are to be shown turned.
            blurred: tiles of a slide that were left out.
            failed: why the slide cannot be read.
        """
        columns = schema(self.dim, placed=self.placed)
        facts = {"job": self.digest, "first": part.first, "last": part.last, "bad": [(b.key, b.reason) for b in bad]}
        facts |= {"turned": turned, "blurred": blurred, "failed": failed, "place": self._place(part)}
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), type=columns.field("vector").type)
        values = [(*row[:3], *(row.place or ())) for row in rows]
        others = [
            pa.array([row[place] for row in values], columns.field(place).type) for place in range(len(columns) - 1)
        ]
        table = pa.table([*others, vectors], columns.with_metadata({_PART_KEY: json.dumps(facts).encode()}))
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
            found = metadata["job"], metadata["first"], metadata["last"], metadata.get("place")
            bad = [BadTile(key, reason) for key, reason in metadata["bad"]]
            more = int(metadata.get("turned", 0)), int(metadata.get("blurred", 0)), metadata.get("failed")
        except _DAMAGE as error:
            logger.warning("%s: damaged (%s), made again", path, " ".join(str(error).split())[:200])
            return None
        wanted = (self.digest, part.first, part.last, self._place(part))
        if found != wanted or not self._has_tokens(part.number, footer.num_rows):
            return None
        return PartFacts(footer.num_rows, bad, *more)

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
            return pq.read_table(path, partitioning=None).cast(schema(self.dim, placed=self.placed))
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

    def claim(self, overwrite: bool) -> None:
        """Take the folder for this job.

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
                "or throw them away with --overwrite"
            )
        if other:
            logger.warning("%s: parts of a job with %s are thrown away", self.folder, other)
            for stale in (*found, *self.folder.glob(f"part-*{SUFFIX}")):
                with writing(stale, REMEDY):
                    stale.unlink()
        self.job.write(self.identity)

    def finished(self) -> dict[int, PartFacts]:
        """What a run before this one finished of the job, by number; a slide that could not be read is tried again."""
        whole = ((part.number, self.facts(part)) for part in self)
        return {number: facts for number, facts in whole if facts is not None and facts.failed is None}

    def remove(self) -> None:
        """Remove the folder with all that is in it; warn about what cannot be removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            logger.warning("%s: could not be removed; it is not needed any more", self.folder)

    def remove_if_empty(self) -> None:
        """Leave no folder behind where nothing was finished, neither a part nor the scan of a slide."""
        finished = (path for pattern in ("part-*.parquet", "slides-*/*") for path in self.folder.glob(pattern))
        if self.folder.is_dir() and not any(True for _ in finished):
            shutil.rmtree(self.folder, ignore_errors=True)


def _differences(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted({*first, *now}) if first.get(name) != now.get(name)]
    return [f"another {', '.join(names)}"] if names else []


def mine(todo: Sequence[int], rank: int, world: int) -> list[int]:
    """The contiguous share of ``todo`` that rank ``rank`` of ``world`` takes."""
    return list(todo[rank * len(todo) // world : (rank + 1) * len(todo) // world])
