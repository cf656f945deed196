"""Read tiles of shards once for digests and thumbnails.

Legend: R tiles of a request, N tiles, S side of a thumbnail.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.common.console.progress import ProgressBar
from ca2cl.data.fingerprints.seen import Seen, SeenShards, fingerprints_of, group_word, pixel_word
from ca2cl.data.fingerprints.thumbnails import SIDE, is_flat, thumbnails
from ca2cl.data.loading.order import Integers
from ca2cl.data.loading.stream import SampleSource, UndecodableError
from ca2cl.data.loading.workers import Pixels, TileWorkers
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex

logger = logging.getLogger(__name__)
SAMPLE = 65_536
"""Tiles of a set that are kept with an encoder: 10 MB."""
_REQUEST = 128
_FEW = 2000
"""Tiles that are read sooner than worker processes start."""


@dataclass(frozen=True)
class Survey:
    """Tiles that decode: sample numbers (N,), pixel digests of 16 bytes, thumbnails uint8 (N, S, S)."""

    samples_N: npt.NDArray[np.int64]
    pixels_N: list[bytes]
    thumbnails_NSS: Tensor
    bad: int = 0
    """Tiles that do not decode and are left out."""

    def __len__(self) -> int:
        return len(self.samples_N)


class _Describe:
    """Decodes a list of sample numbers and keeps what a survey needs of them."""

    def __init__(self, source: SampleSource) -> None:
        self._source = source

    def rows(self, request: Integers) -> int:
        return len(request)

    def __call__(self, request: Integers, tiles_RHWC: Pixels) -> tuple[list[int], list[bytes], npt.NDArray[np.uint8]]:
        samples: list[int] = []
        for sample in request.tolist():
            with contextlib.suppress(UndecodableError):
                self._source.fill(sample, tiles_RHWC[len(samples)])
                samples.append(sample)
        tiles_RHWC = tiles_RHWC[: len(samples)]
        small = thumbnails(torch.from_numpy(tiles_RHWC)).numpy() if samples else np.zeros((0, SIDE, SIDE), np.uint8)
        return samples, [digest_of(tile) for tile in tiles_RHWC], small


def digest_of(tile_HWC: Pixels) -> bytes:
    """16 bytes of a tile's pixels, by which the same pixels are found again."""
    return hashlib.blake2b(tile_HWC.data, digest_size=16).digest()


def survey(
    index: ShardIndex, reader: ShardReader, samples: Sequence[int] | Integers | None = None, *, workers: int, title: str
) -> Survey:
    """Read tiles for their digests and thumbnails.

    Args:
        index: of the shards.
        reader: of the shards.
        samples: sample numbers in ascending order; None takes all.
        workers: decoding processes.
        title: of the progress bar and the log lines.

    Raises:
        InputError: a shard cannot be read.
    """
    numbers = np.arange(len(index), dtype=np.int64) if samples is None else np.asarray(samples, np.int64)
    requests = [numbers[first : first + _REQUEST] for first in range(0, len(numbers), _REQUEST)]
    source = SampleSource(index, reader)
    pool = TileWorkers(_Describe(source), _REQUEST, source.tile_size, workers if len(numbers) > _FEW else 0)
    kept: list[int] = []
    pixels: list[bytes] = []
    small = torch.zeros(len(numbers), SIDE, SIDE, dtype=torch.uint8)
    with (
        ProgressBar(total=len(numbers), desc=title, unit="tile") as bar,
        contextlib.closing(pool.answers(requests)) as answers,
    ):
        for request, ((good, digests, thumbs), _) in zip(requests, answers, strict=True):
            small[len(kept) : len(kept) + len(good)] = torch.from_numpy(thumbs)
            kept += good
            pixels += digests
            bar.update(len(request))
    return Survey(np.array(kept, np.int64), pixels, small[: len(kept)], len(numbers) - len(kept))


def see(index: ShardIndex, reader: ShardReader, *, workers: int, title: str = "seen tiles") -> Seen:
    """All slides of some shards, and digests and fingerprints of up to ``SAMPLE`` of their tiles.

    The tiles are those of the first shards: ``ca2cl shard`` shuffles tiles before it cuts them into shards.

    Args:
        index: of the shards.
        reader: of the shards.
        workers: decoding processes.
        title: of the progress bar.

    Raises:
        InputError: a shard cannot be read.
    """
    tiles = survey(index, reader, np.arange(min(len(index), SAMPLE)), workers=workers, title=title)
    names = {name for shard in index for name in shard.group[:] if name is not None}
    textured_N = ~is_flat(tiles.thumbnails_NSS).numpy()
    words = [pixel_word(digest) for digest, kept in zip(tiles.pixels_N, textured_N, strict=True) if kept]
    return Seen(
        (SeenShards(index.manifest.digest, len(index), len(tiles)),),
        np.unique(np.array([group_word(name) for name in names], np.uint64)),
        np.unique(np.array(words, np.uint64)),
        fingerprints_of(tiles.thumbnails_NSS)[textured_N],
    )
