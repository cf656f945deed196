"""Read the vectors of slides' tiles from a file of ``ca2cl embed``.

Legend: N tiles of a slide, D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

Vectors = npt.NDArray[np.float32]


class SlideVectors(NamedTuple):
    """Tiles of a slide: vectors (N, D), and ``x0, y0, x1, y1`` in level-0 pixels (N, 4)."""

    slide: str
    vectors_ND: Vectors
    boxes_N4: npt.NDArray[np.float64]


def read_slides(path: Path, overlap: float) -> Iterator[SlideVectors]:
    """Yield the tiles of one slide after another.

    Args:
        path: a Parquet file of tiles of slides.
        overlap: share of a tile's side that its neighbour has, too.
    """
    waiting: list[pa.Table] = []
    with pq.ParquetFile(path) as file:
        for group in range(file.num_row_groups):  # each has tiles of one slide
            table = file.read_row_group(group, columns=["slide", "x", "y", "side", "vector"])
            if waiting and waiting[0]["slide"][0] != table["slide"][0]:
                yield _slide(pa.concat_tables(waiting), overlap)
                waiting = []
            waiting.append(table)
    yield _slide(pa.concat_tables(waiting), overlap)


def _slide(table: pa.Table, overlap: float) -> SlideVectors:
    side = table["side"][0].as_py()
    stride = side * (1 - overlap)
    # x and y are whole numbers; the grid's lines need not be
    start_N2 = np.rint(np.stack([table[name].to_numpy() for name in "xy"], axis=1) / stride) * stride
    boxes_N4 = np.concatenate([start_N2, start_N2 + side], axis=1)
    return SlideVectors(table["slide"][0].as_py(), _matrix(table), boxes_N4)


def _matrix(table: pa.Table) -> Vectors:
    column = table["vector"].combine_chunks()
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1))


def sample_vectors(path: Path, most: int, seed: int) -> Vectors:
    """At most ``most`` vectors of the file, drawn by the seed, in order."""
    with pq.ParquetFile(path) as file:
        total = file.metadata.num_rows
        drawn = np.arange(total)
        if total > most:
            drawn = np.sort(np.random.default_rng(seed).choice(total, most, replace=False))
        parts, first = [], 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            rows = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, last)] - first
            if len(rows):
                parts.append(_matrix(file.read_row_group(group, columns=["vector"]))[rows])
            first = last
    return np.concatenate(parts)
