"""Frozen features of both sets, from files of ``ca2cl embed``.

Legend: N tiles of a set, D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.run import run as run_embed
from ca2cl.evaluation.splits import known_slides
from ca2cl.reproduce.config import NctConfig, embedding
from ca2cl.runtime.distributed import Ranks


@dataclass(frozen=True)
class Vectors:
    """One set: ``values_ND`` float32, ``labels_N`` int64."""

    values_ND: npt.NDArray[np.float32]
    labels_N: npt.NDArray[np.int64]
    slides: list[str] | None
    """Slide or patient of every tile, a tile without one being a slide of its own; None where no tile has one."""


def embedded(config: NctConfig, name: str) -> bool:
    """True if a set's vectors are complete."""
    path = config.vectors(name)
    # killed while it put its parts away, the embedding still has to finish that
    return path.exists() and not path.with_name(f"{path.name}.parts").exists()


def make_vectors(config: NctConfig, ranks: Ranks) -> None:
    """Run the encoder over the sets whose vectors are not complete. Every rank calls it."""
    for name in config.sets:
        done = ranks.from_first(lambda name=name: embedded(config, name))  # type: ignore[misc]
        if not done:
            run_embed(embedding(config, name))


def read_vectors(path: Path, index: ShardIndex) -> Vectors:
    """The labelled tiles of a vectors file, in index order; tiles that did not decode are not among them.

    Raises:
        InputError: the file is damaged, or is not of these shards.
    """
    try:
        table = pq.read_table(path, columns=["key", "label", "vector"])
        column = table.column("vector").combine_chunks()
        values_ND = np.asarray(column.flatten(), np.float32).reshape(len(column), -1)
        keys, names = table.column("key").to_pylist(), table.column("label").to_pylist()
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        message = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged ({message}); delete it and start again") from None
    number = {label: place for place, label in enumerate(index.classes)}
    if not set(names) - {None} <= set(number):
        raise InputError(f"{path}: holds other classes than its shards; delete it and start again")
    group_of = {key: group for shard in index for key, group in zip(shard.key, shard.group, strict=True)}
    rows = np.array([row for row, name in enumerate(names) if name is not None], np.int64)
    labels_N = np.array([number[names[row]] for row in rows], np.int64)
    return Vectors(values_ND[rows], labels_N, known_slides([group_of.get(keys[row]) for row in rows]))
