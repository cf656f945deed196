"""Labelled tiles: the held-out split and the training order.

Legend: N labelled tiles to train on, G global batch, W world size, B this rank's share of a batch or of a micro-batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ca2cl.data.loading.sequential import GoodTiles, read_requests
from ca2cl.data.loading.stream import BadTile
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex, key_hash
from ca2cl.evaluation.splits import known_slides, slide_folds, stratified_folds

Integers = npt.NDArray[np.int64]
FEWEST = 15
"""Held-out tiles that can choose an epoch: by ten (30 labels of real tissue, five classes) its choice was chance."""
BY_SLIDES = "whole slides or patients"
"""Reason of ``hold_out`` for what it keeps back, where slides are known."""
IGNORED = -100
"""Label of a row that did not decode: cross-entropy passes over it."""


class LabelledBatch(NamedTuple):
    """Tiles uint8 (B, H, W, 3), labels and one word of randomness a tile, both int64 (B,)."""

    tiles: Tensor
    labels: Tensor
    words: Tensor
    epoch: int
    total: int
    """G, tiles in the global batch."""


@dataclass(frozen=True)
class LabelledStep:
    """One optimizer step's share of this rank (``training.loop.StepData``)."""

    epoch: int
    bad: list[BadTile]
    micro_batches: list[LabelledBatch]


def hold_out(
    labels_N: Integers, groups: Sequence[str | None] | None, share: float, seed: int
) -> tuple[npt.NDArray[np.bool_], str]:
    """Mask (N,) of the labelled tiles that are kept from training to decide when it ends, and the reason in words.

    Where slides or patients are known, whole ones or none: tiles of a slide that is trained on say nothing about other
    slides. Both sides hold every class, or none is held out; nor is any where fewer than ``FEWEST`` would be: they
    would choose by chance, and are worth more in the training.

    Args:
        groups: slide or patient of every tile, a tile without one being a slide of its own; None, and tiles are held
            out one by one.
        share: of the tiles, about; 0 holds out none.
    """
    none = np.zeros(len(labels_N), bool)
    if share == 0:
        return none, "none: held_out is 0"
    slides = None if groups is None else known_slides(groups)
    folds = max(2, round(1 / share))
    if slides is not None:
        folds = min(folds, len(set(slides)))
    if folds < 2 or np.bincount(labels_N).min() < folds:
        return none, f"none: a class has fewer than {folds} labelled tiles" if folds > 1 else "none: there is one slide"
    if slides is None:
        return _enough(stratified_folds(labels_N, folds, seed) == 0, "tiles of any slide")
    fold_N, classes = slide_folds(labels_N, slides, folds, seed), len(np.unique(labels_N))
    for fold in range(folds):
        held = fold_N == fold
        if len(np.unique(labels_N[held])) == len(np.unique(labels_N[~held])) == classes:
            return _enough(held, BY_SLIDES)
    return none, "none: no whole slides hold every class and leave some of it"


def _enough(held_N: npt.NDArray[np.bool_], how: str) -> tuple[npt.NDArray[np.bool_], str]:
    if held_N.sum() < FEWEST:
        return np.zeros_like(held_N), f"none: fewer than {FEWEST} tiles would be"
    return held_N, how


@dataclass(frozen=True)
class LabelledOrder:
    """The batches of every epoch: slices of one permutation by (seed, epoch), the same on any number of processes.

    With fewer tiles than a batch, a batch is all of them.
    """

    samples_N: Integers
    """A number may come several times."""
    batch_size: int
    seed: int
    fewest: int | None = None
    """Least tiles of a smaller batch at the end of an epoch. Fewer are left out until another epoch; None: always."""

    @property
    def size(self) -> int:
        """G, tiles in every whole batch."""
        return min(self.batch_size, len(self.samples_N))

    @property
    def steps_per_epoch(self) -> int:
        """Batches in a pass over the tiles."""
        whole, rest = divmod(len(self.samples_N), self.size)
        return whole + (self.fewest is not None and rest >= self.fewest)

    def batches(self, steps: range) -> Iterator[Integers]:
        """Places in ``samples_N`` (G,) of one optimizer step after another."""
        last, places = -1, self.samples_N
        for step in steps:
            epoch, number = divmod(step, self.steps_per_epoch)
            if epoch != last:
                last, places = epoch, self._places(epoch)
            yield places[number * self.size : (number + 1) * self.size]

    def permuted(self, epoch: int) -> Integers:
        """All sample numbers (N,) in the order of an epoch."""
        return self.samples_N[self._places(epoch)]

    def _places(self, epoch: int) -> Integers:
        words = np.random.Philox(key=np.array([self.seed, epoch], np.uint64)).random_raw(len(self.samples_N))
        return np.argsort(words, kind="stable")


def labelled_steps(
    index: ShardIndex,
    reader: ShardReader,
    order: LabelledOrder,
    *,
    rank: int,
    world: int,
    micro_batch_size: int | None,
    workers: int,
    device: torch.device,
    steps: range,
) -> Iterator[LabelledStep]:
    """This rank's share of the batches of ``steps``: every W-th tile, in as many micro-batches as any other rank's.

    A tile that does not decode is stood in for by another of its batch, and its label is ``IGNORED``.

    Args:
        index: of the shards.
        reader: of the shards.
        order: which tiles a step takes.
        rank: this process.
        world: processes.
        micro_batch_size: most tiles at a time; None: a step's whole share.
        workers: decoding processes.
        device: where tiles go.
        steps: optimizer steps, from 0.
    """
    words_N = _words(index, order.samples_N)
    batches = list(order.batches(steps))
    shares = [places[rank::world] for places in batches]
    requests = [order.samples_N[places] for places in shares]
    read = read_requests(index, reader, requests, workers=workers)
    for step, places, batch, (samples, good) in zip(steps, shares, batches, read, strict=True):
        most = -(-len(batch) // world)
        parts = -(-most // (micro_batch_size or most))
        drawn = torch.from_numpy(words_N[places])
        epoch = step // order.steps_per_epoch
        split = (torch.tensor_split(x, parts) for x in (*_filled(good, samples), drawn))
        micro_batches = [
            LabelledBatch(t.to(device), y.to(device), w, epoch, len(batch)) for t, y, w in zip(*split, strict=True)
        ]
        yield LabelledStep(epoch, good.bad, micro_batches)


def _words(index: ShardIndex, samples_N: Integers) -> Integers:
    """A word (N,) for every place, made of its sample's key; one that was drawn again is augmented in another way."""
    keys: dict[int, str] = {}
    for shard, start in enumerate(index.starts[:-1].tolist()):
        here = np.unique(samples_N[(samples_N >= start) & (samples_N < index.starts[shard + 1])])
        if len(here):
            held = index.samples(shard).key
            keys.update({sample: held[sample - start] for sample in here.tolist()})
    before: Counter[int] = Counter()
    words = []
    for sample in samples_N.tolist():
        again = before[sample]
        words.append(key_hash(f"{keys[sample]} {again}" if again else keys[sample]))
        before[sample] += 1
    return np.array(words, np.int64)


def _filled(good: GoodTiles, wanted: Integers) -> tuple[Tensor, Tensor]:
    """A row for every wanted sample, in their order; those that did not decode show the first that did."""
    place = {sample: row for row, sample in enumerate(good.samples)}
    tiles = good.tiles if good.samples else good.tiles.new_zeros(1, *good.tiles.shape[1:])
    rows = [place.get(sample, 0) for sample in wanted.tolist()]
    labels = [good.labels[place[sample]] if sample in place else IGNORED for sample in wanted.tolist()]
    return tiles[rows], torch.tensor(labels)
