"""Write vectors as one Parquet or safetensors file, part by part.

Safetensors holds the vectors, and patch tokens where the job makes them. Keys, labels and sources lie in
``NAME.keys.jsonl`` beside it, line i for row i: safetensors' readers refuse a header above 100 MB, which the keys of a
million tiles fill, and parse all of it whenever they open the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ca2cl.common.files import replacing, writing
from ca2cl.common.records import json_line, parse_json
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.parts import REMEDY, parquet_writer, schema
from ca2cl.evaluation.embed.patch_tokens import TokenGrid, copy_tokens

METADATA_KEY = "ca2cl"
"""Of the file's metadata: JSON that says what was embedded by what."""
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit

Tables = Callable[[], Iterable[pa.Table]]


def outputs(out: Path) -> list[Path]:
    """The files that a result consists of; ``out`` last, as it is written."""
    return [keys_path(out), out] if out.suffix == ".safetensors" else [out]


def keys_path(out: Path) -> Path:
    """The side file of a safetensors result."""
    return out.with_name(f"{out.stem}.keys.jsonl")


def slides_path(out: Path) -> Path:
    """Rows of the slides that the tiles are from."""
    return out.with_name(f"{out.stem}.slides.jsonl")


class PatchTokens(NamedTuple):
    """Patch tokens of the rows, and the files of the parts that hold them."""

    grid: TokenGrid
    paths: Sequence[Path]


def write_vectors(
    out: Path, tables: Tables, rows: int, dim: int, about: Mapping[str, Any], tokens: PatchTokens | None = None, *,
    placed: bool = False,
) -> None:  # fmt: skip
    """Write ``out`` by its suffix.

    Args:
        tables: the parts in order, gone through once or twice.
        rows: of all parts together.
        dim: D.
        about: what the file's metadata says; the same content gives the same bytes.
        tokens: patch tokens, for a safetensors file.
        placed: True for tiles of slides.
    """
    text = json_line(about).decode().strip()
    if out.suffix == ".parquet":
        _write_parquet(out, tables, schema(dim, placed=placed), text)
        return
    with writing(out, REMEDY):
        out.unlink(missing_ok=True)  # never an old result beside new keys
    _write_keys(keys_path(out), tables)
    _write_safetensors(out, tables, rows, dim, text, tokens)


def _write_parquet(out: Path, tables: Tables, columns: pa.Schema, about: str) -> None:
    columns = columns.with_metadata({METADATA_KEY: about})
    with writing(out, REMEDY), replacing(out) as file, parquet_writer(file, columns) as writer:
        for table in tables():
            if len(table):
                writer.write_table(table, row_group_size=len(table))


def _write_keys(path: Path, tables: Tables) -> None:
    with writing(path, REMEDY), replacing(path) as file:
        for table in tables():
            for row in table.drop_columns("vector").to_pylist():
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")


def _write_safetensors(out: Path, tables: Tables, rows: int, dim: int, about: str, tokens: PatchTokens | None) -> None:
    """The format's own layout: header length as 8 bytes, little-endian; the header, JSON; the numbers. Its library
    writes tensors that are in memory as a whole."""
    end = 4 * rows * dim
    content: dict[str, Any] = {"__metadata__": {METADATA_KEY: about}}
    content["vectors"] = {"dtype": "F32", "shape": [rows, dim], "data_offsets": [0, end]}
    if tokens is not None:
        grid, last = tokens.grid, end + rows * tokens.grid.tile_bytes
        content["tokens"] = {"dtype": grid.code, "shape": [rows, *grid.shape], "data_offsets": [end, last]}
    header = json.dumps(content).encode()
    header += b" " * (-len(header) % 8)
    with writing(out, REMEDY), replacing(out) as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for table in tables():
            for column in table.column("vector").chunks:
                file.write(column.flatten().to_numpy().astype("<f4", copy=False).tobytes())
        if tokens is not None:
            copy_tokens(tokens.paths, file)


def open_vectors(out: Path) -> npt.NDArray[np.float32]:
    """The vectors (N, D) of a safetensors result, mapped from the file and not read.

    Raises:
        InputError: no such file, or a damaged one.
    """
    try:
        with out.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            shape = parse_json(file.read(min(length, _LONGEST_HEADER)))["vectors"]["shape"]
        rows, dim = (int(number) for number in shape)
        return np.memmap(out, "<f4", "r", offset=8 + length, shape=(rows, dim))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out}: not a whole file of vectors ({error}); remove it, and make it again") from None


def read_about(out: Path) -> dict[str, Any] | None:
    """Metadata of a result; None where ``out`` is none."""
    with suppress(pa.ArrowException, OSError, ValueError, KeyError, TypeError):
        if out.suffix == ".parquet":
            text = pq.read_schema(out).metadata[METADATA_KEY.encode()]
        else:
            with out.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                text = parse_json(file.read(min(length, _LONGEST_HEADER)))["__metadata__"][METADATA_KEY]
        about = parse_json(text)
        return about if isinstance(about, dict) else None
    return None
