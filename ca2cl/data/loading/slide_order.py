"""Sample order in which a batch has few tiles of a slide.

Slides follow one another in an order permuted by (seed, epoch), each with its tiles in an order permuted by (seed,
epoch, slide), as one sequence. It is cut into G runs of T samples, the steps of an epoch, and global batch t takes
sample t of every run: every T-th sample of the sequence (McNaughton's wrap-around rule, Management Science 6, 1959). A
slide's c samples lie side by side, so a batch has floor(c / T) or ceil(c / T) of them, and no order is more even. Of a
slide with more than n T samples, n T take part in an epoch and others in the next one. A batch then has at most n of
every slide.

As in ``LaneOrder``, nothing depends on the number of processes or workers, and the step is the whole position. What it
costs: every start reads the slides of all samples, which are then a table of 4 bytes a sample in every process (its
workers share it), and a batch reads from G places. These lie in all shards, because ``ca2cl shard`` mixes tiles.

Legend: N samples, S slides, L lanes, G global batch, q samples a lane gives, T steps of an epoch, n most tiles a slide.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ca2cl.data.loading.order import MAX_REPLACEMENTS, Integers, LaneOrder, Sized, permutation
from ca2cl.errors import InputError

_SLIDES = 0
_FIRST_SLIDE = 1
_MOST_SHARDS = 1 << 14
"""Shards whose part of the index a process keeps: any batch may read any shard."""


class Grouped(Sized, Protocol):
    """The part of an index that the order needs."""

    def slides(self) -> tuple[npt.NDArray[np.int32], int]:
        """A number for every sample's slide, -1 where it has none, and how many slides there are."""


@dataclass(frozen=True)
class SlideTable:
    """The samples of every slide. Those without a slide are in no limit: a shard's are counted as one.

    Attributes:
        samples_N: sample numbers, slide after slide, ascending within each.
        firsts: where each slide begins in them, and the end: those with a name, and one more for each shard that has
            samples without.
        named: how many have a name.
    """

    samples_N: npt.NDArray[np.uint32] | Integers
    firsts: Integers
    named: int

    @classmethod
    def of(cls, index: Grouped) -> SlideTable:
        """The table of an index."""
        slide_N, named = index.slides()
        nameless = np.flatnonzero(slide_N < 0)
        _, shard_of = np.unique(np.searchsorted(index.starts, nameless, side="right"), return_inverse=True)
        slide_N[nameless] = named + shard_of
        counts = np.bincount(slide_N, minlength=named)
        if len(counts) <= np.iinfo(np.uint16).max:
            slide_N = slide_N.astype(np.uint16)  # of which a stable sort is a radix sort
        kind = np.uint32 if len(slide_N) <= np.iinfo(np.uint32).max else np.int64
        samples_N = np.argsort(slide_N, kind="stable").astype(kind)
        return cls(samples_N, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), named)

    @property
    def sizes(self) -> Integers:
        """Samples of each slide."""
        return np.diff(self.firsts)


class SlideOrder(LaneOrder):
    """The samples of every batch, at most ``max_per_slide`` of a slide.

    Lane l has the runs l q to (l + 1) q - 1, which are also its rows in a batch.

    Args:
        index: the shards' index.
        lanes, batch_size, seed, world, least, fewer: as of ``LaneOrder``.
        max_per_slide: n.

    Attributes:
        table: samples by slide.
        kept: samples of each slide that take part in an epoch.

    Raises:
        InputError: as ``LaneOrder``; no sample has a slide; or the slides are too few for a batch.
    """

    def __init__(
        self,
        index: Grouped,
        lanes: int,
        batch_size: int,
        seed: int,
        max_per_slide: int,
        *,
        world: int = 1,
        least: int = 2,
        fewer: Callable[[int], str] = lambda tiles: "",
    ) -> None:
        super().__init__(index, lanes, batch_size, seed, world=world, least=least, fewer=fewer)
        self.table, self.max_per_slide = SlideTable.of(index), max_per_slide
        if not self.table.named:
            raise InputError(
                f"data.max_per_slide is {max_per_slide}: no tile of data.shards has a slide or patient; leave it out, "
                "or write the shards with --group_pattern or --group_column"
            )
        self.steps_per_epoch = self._most_steps()
        if self.steps_per_epoch < 1:
            raise InputError(
                f"data.max_per_slide is {max_per_slide}: {self.table.named} slides with at most {max_per_slide} tiles "
                f"each give {self._kept(1).sum()} of the run.batch_size = {batch_size} tiles of a batch; use "
                f"--data.max_per_slide {self._enough()}, or a smaller run.batch_size"
            )
        self.kept = self._kept(self.steps_per_epoch)
        self.lane_length = self.steps_per_epoch * self.per_lane
        self._order = lru_cache(1)(self._permuted_slides)
        # Every run stands in one slide, or on a border between two; the rest is room for replacements.
        self._tiles = lru_cache(batch_size + 64)(self._tiles_of)

    @property
    def limited(self) -> int:
        """Slides of which some samples are left out of every epoch."""
        return int((self.kept < self.table.sizes).sum())

    def shards_open(self, world: int) -> int:
        """As ``LaneOrder.shards_open``: any shard."""
        return min(len(self.starts) - 1, _MOST_SHARDS)

    def replacements(self, step: int, row: int) -> Iterator[int]:
        """As ``LaneOrder.replacements``, such that the batch keeps to the limit.

        Samples of the same slide come first. Those of a slide that lies within the row's run follow: no other row of
        the batch has or takes one. Where both fail, the rest of the run follows, and a slide may exceed the limit by
        one.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        slides, starts = self._order(epoch)
        run, place = row * self.steps_per_epoch, row * self.steps_per_epoch + within
        own, last = np.searchsorted(starts, [place, run + self.steps_per_epoch - 1], side="right") - 1
        first = int(np.searchsorted(starts, run, side="right")) - 1

        def tiles(at: int) -> list[int]:
            found: list[int] = self._tiles(epoch, int(slides[at])).tolist()
            after = (place - int(starts[at])) % max(1, len(found)) if at == own else 0
            return found[after:] + found[:after]

        inner = [at for at in (*range(own + 1, last), *range(first + 1, own))]
        ends = [at for at in (last, first) if at != own]
        numbers = chain.from_iterable(tiles(at) for at in (own, *inner, *ends))
        return islice(numbers, 1, 1 + MAX_REPLACEMENTS)

    def _lookup(self, epoch: int, virtual_B: Integers) -> Integers:
        lane_B, rest_B = np.divmod(virtual_B, self.lane_length)
        within_B, j_B = np.divmod(rest_B, self.per_lane)
        sequence_B = (lane_B * self.per_lane + j_B) * self.steps_per_epoch + within_B
        slides, starts = self._order(epoch)
        place_B = np.searchsorted(starts, sequence_B, side="right") - 1
        samples_B = np.empty_like(virtual_B)
        borders = [0, *(np.flatnonzero(np.diff(place_B)) + 1).tolist(), len(place_B)]
        for first, stop in zip(borders, borders[1:], strict=False):
            if first < stop:
                place = int(place_B[first])
                tiles = self._tiles(epoch, int(slides[place]))
                samples_B[first:stop] = tiles[sequence_B[first:stop] - starts[place]]
        return samples_B

    def _permuted_slides(self, epoch: int) -> tuple[Integers, Integers]:
        """Slides in the epoch's order, and the place of the sequence at which each begins; empty ones left out."""
        slides = np.flatnonzero(self.kept)[permutation(self.seed, epoch, _SLIDES, int((self.kept > 0).sum()))]
        return slides, np.concatenate([[0], np.cumsum(self.kept[slides])]).astype(np.int64)

    def _tiles_of(self, epoch: int, slide: int) -> npt.NDArray[np.uint32] | Integers:
        """The samples of a slide that take part in the epoch, in its order.

        Of m samples c are kept, as evenly as possible: number i of them where i c / m passes a whole number. The
        pattern moves on by one sample an epoch, so that each takes part in c of m epochs.
        """
        first, stop = self.table.firsts[slide : slide + 2].tolist()
        samples, kept = self.table.samples_N[first:stop], int(self.kept[slide])
        if kept < len(samples):
            passed = (np.arange(len(samples) + 1) + epoch % len(samples)) * kept // len(samples)
            samples = samples[np.diff(passed) > 0]
        return samples[permutation(self.seed, epoch, _FIRST_SLIDE + slide, kept)]

    def _kept(self, steps: int) -> Integers:
        sizes = self.table.sizes
        limit = np.where(np.arange(len(sizes)) < self.table.named, self.max_per_slide * steps, sizes)
        return np.minimum(sizes, limit)

    def _most_steps(self) -> int:
        """The largest T for which the slides give G T samples; as a function of T, what they give is concave."""
        low, high = 0, int(self.starts[-1]) // self.batch_size
        while low < high:
            middle = (low + high + 1) // 2
            if self._kept(middle).sum() >= middle * self.batch_size:
                low = middle
            else:
                high = middle - 1
        return low

    def _enough(self) -> int:
        """The least n with which the slides fill a batch."""
        sizes, named = self.table.sizes, self.table.named
        wanted = self.batch_size - sizes[named:].sum()
        return bisect_left(range(int(sizes.max())), wanted, key=lambda n: np.minimum(sizes[:named], n).sum())
