"""``ShardDataset``: shards as a map-style torch dataset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ca2cl.data.loading.stream import SampleSource, UndecodableError
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.errors import InputError


class ShardDataset(Dataset[tuple[Any, int]]):
    """The tiles of a folder that ``ca2cl shard`` wrote, in the order of its index.

    A sample is a pair, as in torchvision's datasets: the tile and the number of its class. The tile is uint8
    (3, H, W) in [0, 255], or what ``transform`` makes of it. For a ``DataLoader`` with any sampler and any number of
    workers.

    Args:
        shards: folder or URL of the shards.
        transform: called with the tile; ``encoder.transform`` or one of ``torchvision.transforms.v2``.
        cache_dir: local folder that caches remote shards; needed for a URL.

    Attributes:
        classes: names of the classes.
        targets: number of each tile's class, int64 (N,); -1 for an unlabelled tile.

    Raises:
        ca2cl.errors.InputError: a ``ValueError`` of one line: no such folder, damaged files, an unreachable store.
    """

    def __init__(
        self,
        shards: str | Path,
        *,
        transform: Callable[[torch.Tensor], Any] | None = None,
        cache_dir: str | Path | None = None,
    ) -> None:
        self.index = open_index(shards, cache_dir)
        self.reader = ShardReader(shards, cache_dir, index=self.index)
        self.transform = transform
        self.classes: list[str] = self.index.classes
        self.targets: npt.NDArray[np.int64] = self.index.labels()
        self._source = SampleSource(self.index, self.reader)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """The tile and its class's number, -1 for an unlabelled tile.

        Raises:
            IndexError: no such tile.
            ca2cl.errors.InputError: the tile does not decode, or its shard cannot be read.
        """
        number = int(number)
        if not -len(self) <= number < len(self):
            raise IndexError(f"tile {number} of {len(self)}")
        pixels_HWC = np.empty((*self._source.tile_size, 3), np.uint8)
        try:
            _, label, _ = self._source.fill(number % len(self), pixels_HWC)
        except UndecodableError as failure:
            raise InputError(f"tile {failure.tile.key}: {failure.tile.reason}") from None
        tile = torch.from_numpy(pixels_HWC).permute(2, 0, 1)
        return (self.transform(tile) if self.transform else tile), label

    def keys(self) -> list[str]:
        """Keys of all tiles: their paths without the extension."""
        return [key for shard in self.index for key in shard.key]

    def groups(self) -> list[str | None]:
        """Slide or patient of every tile, where the shards name it."""
        return self.index.groups()

    def __repr__(self) -> str:
        height, width = self._source.tile_size
        return f"ShardDataset({len(self)} tiles of {width} x {height} pixels, {len(self.classes)} classes)"
