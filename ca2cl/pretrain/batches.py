"""From the lane stream to what a method's step takes: tiles on the device, views made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch

from ca2cl.data.loading.stream import BadTile, LaneStream, TileBatch
from ca2cl.methods.base import ViewBatch
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.views.build import Views


class MicroBatches(Sequence[ViewBatch]):
    """A step's tiles in micro-batches of ``size`` rows, each turned into its views on access: views are a pure
    function of the tile's key, so a method that asks twice gets the same ones.

    With ``groups``, rows come in the order in which groups of normalisation are runs of them.
    """

    def __init__(
        self, batch: TileBatch, views: Views, device: torch.device, size: int, groups: LaneGroups | None = None
    ) -> None:
        self._batch, self._views, self._device, self._size, self._groups = batch, views, device, size, groups
        self._order = torch.arange(len(batch.keys)) if groups is None else groups.first_order(batch.positions)

    def __len__(self) -> int:
        return -(-len(self._batch.keys) // self._size)

    @overload
    def __getitem__(self, number: int) -> ViewBatch: ...
    @overload
    def __getitem__(self, number: slice) -> list[ViewBatch]: ...
    def __getitem__(self, number: int | slice) -> ViewBatch | list[ViewBatch]:
        """The views of micro-batch ``number``."""
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        start = (number % len(self)) * self._size
        rows = self._order[start : start + self._size]
        tiles, positions = (
            part[rows].to(self._device, non_blocking=True) for part in (self._batch.tiles, self._batch.positions)
        )
        # The keys stay: what a view draws is drawn on the host.
        made = self._views(tiles, self._batch.key_hash[rows], self._batch.epoch)
        x1, x2 = (x.contiguous(memory_format=torch.channels_last) for x in made)
        second_order = self._groups.second_order(len(x2)).to(self._device) if self._groups else None
        return ViewBatch(x1, x2, positions, second_order)


@dataclass(frozen=True)
class FedStep:
    """One optimizer step's share of this rank (``loop.StepData``)."""

    epoch: int
    bad: list[BadTile]
    micro_batches: MicroBatches


def feed(
    stream: LaneStream,
    views: Views,
    device: torch.device,
    micro_batch_size: int,
    groups: LaneGroups | None = None,
) -> Iterator[FedStep]:
    """The stream's batches as the loop takes them."""
    for batch in stream:
        yield FedStep(batch.epoch, batch.bad, MicroBatches(batch, views, device, micro_batch_size, groups))
