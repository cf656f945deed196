"""Micro-batches of tiles on the device, for a method's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ca2cl.data.loading.stream import BadTile, LaneStream, TileBatch
from ca2cl.methods.base import Tiles
from ca2cl.models.bn_groups import LaneGroups

MakeViews = Callable[[Tiles], Any]
"""Makes the input of a method's step from a micro-batch; a pure function."""


class MicroBatches(Sequence[Any]):
    """A step's tiles in micro-batches of ``size`` rows, each turned into its views on access.

    With ``groups``, rows come in the order in which groups of normalisation are runs of them.
    """

    def __init__(
        self, batch: TileBatch, views: MakeViews, device: torch.device, size: int, groups: LaneGroups | None = None
    ) -> None:
        self._batch, self._views, self._device, self._size, self._groups = batch, views, device, size, groups
        self._order = None if groups is None else groups.first_order(batch.positions)

    def __len__(self) -> int:
        return -(-len(self._batch.keys) // self._size)

    def __getitem__(self, number: Any) -> Any:
        """The views of micro-batch ``number``."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        rows = slice(number * self._size, (number + 1) * self._size)
        tiles, positions, keys = (
            self._rows(x, rows) for x in (self._batch.tiles, self._batch.positions, self._batch.key_hash)
        )
        tiles, positions = (x.to(self._device, non_blocking=True) for x in (tiles, positions))
        second_order = None
        if self._groups is not None:
            second_order = self._groups.second_order(len(keys)).to(self._device, non_blocking=True)
        return self._views(Tiles(tiles, keys, self._batch.epoch, positions, second_order))

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of ``x`` in the order of groups; in pinned memory where ``x`` is, or no copy from it is asynchronous."""
        if self._order is None:
            return x[rows]
        order = self._order[rows]
        return torch.index_select(x, 0, order, out=x.new_empty(len(order), *x.shape[1:], pin_memory=x.is_pinned()))


@dataclass(frozen=True)
class FedStep:
    """One optimizer step's share of this rank (``loop.StepData``)."""

    epoch: int
    bad: list[BadTile]
    micro_batches: MicroBatches


def feed(
    stream: LaneStream,
    views: MakeViews,
    device: torch.device,
    micro_batch_size: int,
    groups: LaneGroups | None = None,
) -> Iterator[FedStep]:
    """The stream's batches as the loop takes them.

    Args:
        stream: batches of this rank.
        views: makes the views.
        device: where tiles go.
        micro_batch_size: most tiles at a time.
        groups: BatchNorm groups of ``lane_group``; None: there are none.
    """
    for batch in stream:
        yield FedStep(batch.epoch, batch.bad, MicroBatches(batch, views, device, micro_batch_size, groups))
