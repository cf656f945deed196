"""One shard and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ca2cl.common.records import Count


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its file name, size in bytes, SHA-256 and number of samples."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    bytes: Count
    sha256: str
    samples: Count


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
