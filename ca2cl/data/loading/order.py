"""Sample order as a pure function of seed, epoch and position.

(seed, epoch) permutes the shards into one virtual sequence of all samples; inside a shard, (seed, epoch, shard)
permutes the samples. The sequence's first L * lane_length samples are cut into L equal runs, the lanes: whole shards
follow one another in a lane, and with fewer shards than lanes the cut falls inside shards, by the same rule. Global
batch t of an epoch takes the next q = G / L samples of every lane. Nothing depends on the number of processes or
workers, and one integer, the optimizer step, is the whole position.

Legend: N samples, P shards, L lanes, G global batch, B this rank's share of it, W world size, q samples a lane gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ca2cl.errors import InputError

Integers = npt.NDArray[np.int64]

# The second 64-bit half of Philox's counter tells the permutations of one epoch apart.
_SHARDS = 0
_FIRST_SHARD = 1
MAX_REPLACEMENTS = 64
"""Undecodable tiles in a row of a lane after which the data, not the tile, is at fault."""


class Sized(Protocol):
    """The part of an index that the order needs: the number of samples before each shard, shape (P + 1,)."""

    starts: Integers


@dataclass(frozen=True)
class BatchPlan:
    """One rank's share of a global batch.

    ``samples`` (B,) are sample numbers in index order; ``positions`` (B,) their rows in the global batch, whose
    canonical order is lane by lane: row = lane * q + j.
    """

    epoch: int
    samples: Integers
    positions: Integers


def permutation(seed: int, epoch: int, stream: int, length: int) -> Integers:
    """A permutation of ``range(length)`` that is the same under every version of NumPy.

    Philox's raw words are guaranteed stable by NumPy (NEP 19), ``Generator.permutation`` is not; a stable sort of
    random 64-bit words is a uniform permutation up to ties (probability length^2 / 2^65).

    Args:
        seed: the run's.
        epoch: the pass over the data, from 0.
        stream: number that tells permutations of one epoch apart.
        length: of the range.
    """
    generator = np.random.Philox(key=np.array([seed, epoch], np.uint64), counter=np.array([0, 0, stream, 0], np.uint64))
    return np.argsort(generator.random_raw(length), kind="stable").astype(np.int64, copy=False)


def replacements(position: int, per_lane: int, lane_length: int) -> Iterator[int]:
    """Yield the lane positions to try for a bad one: its slot in the next batch, the batch after that, ...

    They wrap round the lane; where slots run out, those of the neighbouring sample follow. A pure function, so that
    neither seeking nor the number of processes changes which sample replaces a bad one. At most 64 are tried.
    """
    rounds = math.ceil(lane_length / per_lane)
    tried = {position}
    for nudge in range(per_lane):
        for ahead in range(rounds):
            place = (position + ahead * per_lane + nudge) % lane_length
            if place not in tried:
                yield place
                tried.add(place)
            if len(tried) > MAX_REPLACEMENTS:
                return


class LaneOrder:
    """The samples of every batch.

    Args:
        index: the shards' index (only its ``starts`` are used).
        lanes: L, number of parallel runs; fixes every batch's content.
        batch_size: G, the global batch; a multiple of L.
        seed: of the whole order, 0 or more.
        world: W, the number of processes for which an error suggests settings.
        least: fewest tiles that a step needs.
        fewer: the flag that lets a step do with so many tiles, such as ``--objective.clusters 8``; empty where the
            method has none.

    Attributes:
        lane_length: samples in a lane, N // L.
        per_lane: q, samples that a batch takes of a lane.
        steps_per_epoch: lane_length // q; the tail that fills no batch is left out and differs in every epoch.

    Raises:
        InputError: G is no multiple of L, or there are fewer samples than one batch.
    """

    def __init__(
        self,
        index: Sized,
        lanes: int,
        batch_size: int,
        seed: int,
        *,
        world: int = 1,
        least: int = 2,
        fewer: Callable[[int], str] = lambda tiles: "",
    ) -> None:
        if lanes < 1 or batch_size < 1 or batch_size % lanes:
            multiple = max(1, lanes) * max(1, round(batch_size / max(1, lanes)))
            raise InputError(
                f"run.batch_size is {batch_size}: a batch takes the same number of tiles from each of "
                f"data.lanes = {lanes} lanes; use a multiple, such as --run.batch_size {multiple}"
            )
        self.starts = np.asarray(index.starts, np.int64)
        self.lanes, self.batch_size, self.seed = lanes, batch_size, seed
        self.per_lane = batch_size // lanes
        self._least, self._fewer, total = least, fewer, int(self.starts[-1])
        self.lane_length = total // lanes
        self.steps_per_epoch = self.lane_length // self.per_lane
        if self.steps_per_epoch < 1:
            raise InputError(
                f"run.batch_size is {batch_size}: {total} tiles are fewer than a batch of {batch_size}; "
                f"{self._remedy(world)}"
            )
        self._sequence = lru_cache(1)(self._shards)
        # Every lane stands in one shard, or on a border between two; the rest is room for replacements.
        self._permuted = lru_cache(2 * lanes + 64)(self._permute)

    def sample(self, epoch: int, lane: int, position: int) -> int:
        """Sample number at ``position`` (below ``lane_length``) of a lane."""
        assert 0 <= lane < self.lanes and 0 <= position < self.lane_length, (lane, position)
        return int(self._lookup(epoch, np.array([lane * self.lane_length + position], np.int64))[0])

    def batch(self, step: int, rank: int = 0, world: int = 1) -> BatchPlan:
        """The share of rank ``rank`` of ``world`` in the batch of global optimizer step ``step``.

        Raises:
            InputError: W does not divide L.
        """
        self.check_world(world)
        assert 0 <= rank < world and step >= 0, (rank, world, step)
        epoch, within = divmod(step, self.steps_per_epoch)
        lanes = np.arange(rank, self.lanes, world, dtype=np.int64)[:, None]
        j = np.arange(self.per_lane, dtype=np.int64)[None, :]
        virtual = lanes * self.lane_length + within * self.per_lane + j
        return BatchPlan(epoch, self._lookup(epoch, virtual.ravel()), (lanes * self.per_lane + j).ravel())

    def replacements(self, step: int, row: int) -> Iterator[int]:
        """Yield the samples to try, one after another, where that of a row of a batch does not decode.

        Args:
            step: of the batch.
            row: in the global batch.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        lane, j = divmod(row, self.per_lane)
        for place in replacements(within * self.per_lane + j, self.per_lane, self.lane_length):
            yield self.sample(epoch, lane, place)

    def shards_open(self, world: int) -> int:
        """Shards in which the lanes of one of ``world`` processes stand at a time, and room for the next ones."""
        return 2 * self.lanes // world + 64

    def check_world(self, world: int) -> None:
        """Check that ``world`` processes can share the lanes evenly.

        Raises:
            InputError: they cannot.
        """
        if world < 1 or self.lanes % world:
            *others, most = [str(number) for number in range(1, self.lanes + 1) if self.lanes % number == 0]
            listed = f"{', '.join(others)} or {most}" if others else most
            raise InputError(
                f"data.lanes is {self.lanes}: {world} processes cannot share them evenly; start {listed} processes, or "
                f"{self._remedy(max(1, world))}"
            )

    def _lookup(self, epoch: int, virtual_B: Integers) -> Integers:
        """Sample numbers at ascending positions of the epoch's virtual sequence."""
        shards, starts = self._sequence(epoch)
        place_B = np.searchsorted(starts, virtual_B, side="right") - 1
        samples_B = np.empty_like(virtual_B)
        # Ascending positions come shard by shard: each run of equal places is one shard's.
        borders = [0, *(np.flatnonzero(np.diff(place_B)) + 1).tolist(), len(place_B)]
        for first, stop in zip(borders, borders[1:], strict=False):
            if first < stop:
                place = int(place_B[first])
                shard = int(shards[place])
                rows = self._permuted(epoch, shard)[virtual_B[first:stop] - starts[place]]
                samples_B[first:stop] = self.starts[shard] + rows
        return samples_B

    def _shards(self, epoch: int) -> tuple[Integers, Integers]:
        """Shard numbers in the epoch's order, (P,), and the virtual position at which each begins, (P + 1,)."""
        shards = permutation(self.seed, epoch, _SHARDS, len(self.starts) - 1)
        lengths = np.diff(self.starts)[shards]
        return shards, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)

    def _permute(self, epoch: int, shard: int) -> Integers:
        length = int(self.starts[shard + 1] - self.starts[shard])
        return permutation(self.seed, epoch, _FIRST_SHARD + shard, length)

    def _remedy(self, world: int) -> str:
        """Settings near to these that do."""
        if found := self._fitting(world, self._least):
            size, count = found
            return f"use --run.batch_size {size}" + (f" with --data.lanes {count}" if count != self.lanes else "")
        found = self._fitting(world, 2)
        if found is None:
            return "make shards of more tiles" + (", or start fewer processes" if world > 1 else "")
        size, count = found
        flag = self._fewer(size)
        smaller = f", or use --run.batch_size {size} with --data.lanes {count} and {flag}" if flag else ""
        return f"make shards of more tiles{smaller}"

    def _fitting(self, world: int, least: int) -> tuple[int, int] | None:
        """A batch size of ``least`` or more and a number of lanes, near to these, that the samples and ``world``
        processes allow; None where there are none."""
        for count in range(max(world, self.lanes - self.lanes % world), 0, -world):
            most = int(self.starts[-1]) // count
            each = min(max(round(self.batch_size / count), -(-least // count)), most)
            if each >= 1 and each * count >= least:
                return each * count, count
        return None
