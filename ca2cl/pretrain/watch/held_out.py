"""Held-out tiles of a watch, dealt to the ranks in blocks.

A block is embedded by one pass, so that a tile's features do not depend on the number of processes.

Legend: N tiles, B tiles of a block, H, W height and width in pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.data.loading.sequential import GoodTiles, read_requests
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import ShardIndex, key_hash
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from ca2cl.evaluation.splits import known_slides, labelled_subset, slide_folds, stratified_folds, stratified_sample
from ca2cl.pretrain.watch.config import WatchConfig

logger = logging.getLogger(__name__)
Integers = npt.NDArray[np.int64]
ROWS = 32
"""Tiles of a block."""
KEPT_BYTES = 1 << 29
"""Most memory for a process's share of the tiles, which is read again each time if it is larger."""
FOLDS = 5
_STREAM = 1 << 37  # of random words, beside those of evaluation.splits


@dataclass(frozen=True)
class WatchedTiles:
    """The tiles of a watch, in an order of their own that mixes classes and slides.

    Attributes:
        index: of the held-out shards.
        samples_N: their numbers in it.
        words_N: a word a tile, from which its views are drawn.
        labels_N: their classes; None without labels, or with one class.
        unit_N: number of each tile's slide or patient, or of the tile where they are not known.
        fold_N: folds of the linear probe, whole slides where they are known; None without labels.
        reference: labelled tiles of other shards that vote and are fitted; None: these do.
    """

    index: ShardIndex
    samples_N: Integers
    words_N: Integers
    labels_N: Integers | None
    unit_N: Integers
    fold_N: Integers | None
    reference: WatchedTiles | None = None

    def __len__(self) -> int:
        return len(self.samples_N)

    @property
    def by_slide(self) -> bool:
        """Whether slides or patients are known."""
        return len(np.unique(self.unit_N)) < len(self)

    def blocks(self, rank: int, world: int) -> list[Integers]:
        """Places (B,) of each of a rank's blocks, as many for every rank; blocks that it has too few of are empty."""
        places = np.arange(len(self))
        blocks = [places[first : first + ROWS] for first in range(0, len(self), ROWS)]
        passes = -(-len(blocks) // world)
        own = blocks[rank::world]
        return own + [places[:0]] * (passes - len(own))

    def only(self, places: Integers) -> WatchedTiles:
        """Those at some places."""
        labels, folds = (None if x is None else x[places] for x in (self.labels_N, self.fold_N))
        return replace(
            self, samples_N=self.samples_N[places], words_N=self.words_N[places], unit_N=self.unit_N[places],
            labels_N=labels, fold_N=folds,
        )  # fmt: skip


def find_tiles(
    config: WatchConfig, cache_dir: str | None, fetch_timeout: float, trained_on: ShardIndex
) -> WatchedTiles | None:  # fmt: skip
    """Choose the tiles of a watch; None without ``watch.shards``.

    Args:
        config: of the watch.
        cache_dir: for remote shards.
        fetch_timeout: of a remote file, in seconds.
        trained_on: shards that the encoder is trained on.

    Raises:
        InputError: no such shards, those of the training, or ``watch.metric`` needs labels that they have not.
    """
    if not config.shards:
        return None
    index = open_index(config.shards, cache_dir, FetchPolicy(timeout=fetch_timeout))
    if index.manifest.digest == trained_on.manifest.digest:
        raise InputError(
            f"watch.shards is {config.shards!r}: these are the shards of data.shards, and tiles that it trains on say "
            "little about others; give held-out ones, or leave watch.shards out"
        )
    if config.labelled:
        return _with_reference(
            config, index, open_index(config.labelled, cache_dir, FetchPolicy(timeout=fetch_timeout))
        )
    if _votes(trained_on, index):
        logger.info("watch: %s names no slides; the labelled tiles of data.shards vote", config.shards)
        return _with_reference(config, index, trained_on)
    found = choose(index, config.tiles, config.seed)
    if found.labels_N is None and config.metric in ("knn", "linear"):
        raise InputError(
            f"watch.metric is {config.metric}: {config.shards} has not labels of two classes or more; use "
            "--watch.metric uniformity, or labelled shards"
        )
    return found


def _votes(trained_on: ShardIndex, index: ShardIndex) -> bool:
    """Whether tiles of the training vote where none were named: where those that are watched would vote for tiles of
    their own slides, and the classes are the same."""
    if not set(index.classes) <= set(trained_on.classes) or index.has_slides():
        return False
    return all(len(set(np.unique(one.labels())) - {-1}) >= 2 for one in (index, trained_on))


def _with_reference(config: WatchConfig, index: ShardIndex, labelled: ShardIndex) -> WatchedTiles:
    """Half of the tiles of each."""
    if labelled.manifest.digest == index.manifest.digest:
        raise InputError(
            f"watch.labelled is {config.labelled!r}: these are the shards of watch.shards; give others, such as "
            "data.shards, or leave it out"
        )
    classes = [*index.classes, *(name for name in labelled.classes if name not in index.classes)]
    found, reference = (
        choose(one.relabelled(classes), config.tiles // 2, config.seed) for one in (index, labelled)
    )  # fmt: skip
    for name, tiles in ((config.shards, found), (config.labelled, reference)):
        if tiles.labels_N is None:
            raise InputError(f"{name}: has not labels of two classes or more; leave watch.labelled out")
    return replace(found, reference=reference)


def choose(index: ShardIndex, count: int, seed: int) -> WatchedTiles:
    """At most ``count`` tiles: as many of each class as there are of it, up to an equal share, or any if there are no
    labels; the same for the same shards and seed."""
    labels = index.labels()
    classes, sizes = np.unique(labels[labels >= 0], return_counts=True)
    if len(classes) >= 2:
        samples = np.flatnonzero(labels >= 0)
        samples = samples[labelled_subset(labels[samples], max(2, _equal_share(sizes, count)), seed)]
    else:
        samples = stratified_sample(np.full(len(labels), -1, np.int64), count, seed)
    # k-means starts from the first ones, and alignment takes them: they must not be of one class
    words = np.random.Philox(key=np.array([seed, _STREAM], np.uint64)).random_raw(len(samples))
    samples = samples[np.argsort(words, kind="stable")]
    keys, groups = _names(index, samples)
    slides = known_slides(groups)
    units = np.arange(len(samples)) if slides is None else np.unique(slides, return_inverse=True)[1].astype(np.int64)
    drawn = np.array([key_hash(key) for key in keys], np.int64)
    if len(classes) < 2:
        return WatchedTiles(index, samples, drawn, None, units, None)
    own = labels[samples].astype(np.int64)
    fold = stratified_folds(own, FOLDS, seed) if slides is None else slide_folds(own, slides, FOLDS, seed)
    return WatchedTiles(index, samples, drawn, own, units, fold)


def _equal_share(sizes_C: Integers, count: int) -> int:
    """The largest number of tiles a class with which no more than ``count`` are taken in total."""
    low, high = 1, int(sizes_C.max())
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if np.minimum(sizes_C, middle).sum() <= count else (low, middle - 1)
    return low


def _names(index: ShardIndex, samples_N: Integers) -> tuple[list[str], list[str | None]]:
    """Key and slide of each sample."""
    keys, groups = [""] * len(samples_N), list[str | None]([None] * len(samples_N))
    for place in np.argsort(samples_N, kind="stable").tolist():  # shard after shard
        shard, row = index.locate(int(samples_N[place]))
        held = index.samples(shard)
        keys[place], groups[place] = held.key[row], held.group[row]
    return keys, groups


class OwnTiles:
    """This rank's blocks, decoded: kept in memory where they are small, and else read again each time.

    Args:
        tiles: all of the watch.
        reader: of their shards.
        blocks: places of this rank's.
        workers: decoding processes.
    """

    def __init__(self, tiles: WatchedTiles, reader: ShardReader, blocks: Sequence[Integers], workers: int) -> None:
        self._tiles, self._reader, self._blocks, self._workers = tiles, reader, blocks, workers
        height, width = tiles.index.manifest.tile_size
        self._keeps = sum(map(len, blocks)) * height * width * 3 <= KEPT_BYTES
        self._kept: list[tuple[Integers, Tensor]] | None = None

    def __iter__(self) -> Iterator[tuple[Integers, Tensor]]:
        """Places (B,) and pixels uint8 (B, H, W, 3) of each block, less the tiles that do not decode.

        Raises:
            InputError: a shard cannot be read.
        """
        if self._kept is not None:
            yield from self._kept
            return
        kept = []
        for block in self._read():
            if self._keeps:
                kept.append(block)
            yield block
        if self._keeps:
            self._kept = kept

    def _read(self) -> Iterator[tuple[Integers, Tensor]]:
        filled = [block for block in self._blocks if len(block)]
        requests = [self._tiles.samples_N[block] for block in filled]
        read = read_requests(self._tiles.index, self._reader, requests, workers=self._workers if requests else 0)
        for block, (wanted, good) in zip(filled, read, strict=True):
            yield _decoded(block, wanted, good)
        height, width = self._tiles.index.manifest.tile_size
        for _ in range(len(self._blocks) - len(filled)):
            yield np.zeros(0, np.int64), torch.zeros(0, height, width, 3, dtype=torch.uint8)


def _decoded(block: Integers, wanted: Integers, good: GoodTiles) -> tuple[Integers, Tensor]:
    for tile in good.bad:
        logger.warning("watch: sample %s left out: %s", tile.key, tile.reason)
    place = dict(zip(wanted.tolist(), block.tolist(), strict=True))
    return np.array([place[sample] for sample in good.samples], np.int64), good.tiles.clone()
