"""Micro-batches of tiles on the device, for a method's step.

Views are pure functions of a tile, and exact accumulation wants those of a micro-batch up to four times: they are kept
where there is room. On a GPU they are made ahead, on a stream of their own: the loop asks for step t + 1 while the
device works on step t, and finds tiles copied and views rendered beside it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ca2cl.data.loading.stream import BadTile, LaneStream, TileBatch
from ca2cl.methods.base import Method, Tiles
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.views.batch import Views

MakeViews = Callable[[Tiles], Any]
"""Makes the input of a method's step from a micro-batch; a pure function."""
KEPT_BYTES = 2 << 30
"""Most memory for views that are kept, a step."""


def maker(method: Method, views: Views, *, words: bool) -> MakeViews:
    """Makes a method's input; with ``words``, rows bring what drop path draws from."""

    def make(tiles: Tiles) -> Any:
        if words:
            drawn = views.words(tiles.keys, tiles.epoch)
            tiles = tiles._replace(words=drawn.to(tiles.pixels.device, non_blocking=True))
        return method.views(tiles, views)

    return make


class Copies:
    """Tiles from which copies to a GPU are under way: workers may not write into their memory before these are done."""

    def __init__(self) -> None:
        self._under_way: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def add(self, tiles: Tensor, done: torch.cuda.Event) -> None:
        """Keep ``tiles`` until ``done``, an event of the stream that copies them; let go of those that have been."""
        self._under_way.append((done, tiles))
        while self._under_way and self._under_way[0][0].query():  # type: ignore[no-untyped-call]
            self._under_way.popleft()


class MicroBatches(Sequence[Any]):
    """A step's tiles in micro-batches of ``size`` rows, each turned into its views on access.

    Args:
        batch: this rank's share.
        views: makes the views.
        device: where tiles go.
        size: rows of a micro-batch.
        groups: with it, rows come in the order in which groups of normalisation are runs of them.
        stream: CUDA stream on which ``prefetch`` works.
        kept_bytes: most memory for views that are kept until the step ends.
        copies: where tiles that are being copied to a GPU are kept.
    """

    def __init__(
        self,
        batch: TileBatch,
        views: MakeViews,
        device: torch.device,
        size: int,
        groups: LaneGroups | None = None,
        stream: torch.cuda.Stream | None = None,
        kept_bytes: int = KEPT_BYTES,
        copies: Copies | None = None,
    ) -> None:
        self._batch, self._views, self._device, self._size, self._groups = batch, views, device, size, groups
        self._order = None if groups is None else groups.first_order(batch.positions)
        self._stream, self._room, self._copies = stream, kept_bytes, copies
        self._kept: dict[int, Any] = {}
        self._ready: dict[int, torch.cuda.Event] = {}

    def __len__(self) -> int:
        return -(-len(self._batch.keys) // self._size)

    def __getitem__(self, number: Any) -> Any:
        """The views of micro-batch ``number``."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        if number not in self._kept:
            return self._keep(number, self._make(number))
        if number in self._ready:  # made on another stream, which may not reuse their memory before this one is done
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._ready.pop(number))
            for tensor in _tensors(self._kept[number]):
                tensor.record_stream(current)
        return self._kept[number]

    def prefetch(self) -> None:
        """Start copying tiles and making views of as many micro-batches as are kept; on a GPU only."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            for number in range(len(self)):
                before = self._room
                self._keep(number, self._make(number))
                if number not in self._kept:
                    return
                self._ready[number] = self._stream.record_event()
                if self._room < before - self._room:  # the next one's would find none
                    return

    def _make(self, number: int) -> Any:
        rows, batch = slice(number * self._size, (number + 1) * self._size), self._batch
        tiles, keys = (self._rows(x, rows) for x in (batch.tiles, batch.key_hash))
        numbers_2B = torch.stack([self._rows(x, rows) for x in (batch.positions, batch.slides)])  # one copy for both
        tiles, (positions, slides) = (x.to(self._device, non_blocking=True) for x in (tiles, numbers_2B))
        if self._copies is not None:
            self._copies.add(batch.tiles, torch.cuda.current_stream(self._device).record_event())
        second_order = None
        if self._groups is not None:
            second_order = self._groups.second_order(len(keys)).to(self._device, non_blocking=True)
        return self._views(Tiles(tiles, keys, batch.epoch, positions, second_order, slides=slides))

    def _rows(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of ``x`` in the order of groups; in pinned memory where ``x`` is, or no copy from it is asynchronous."""
        if self._order is None:
            return x[rows]
        order = self._order[rows]
        return torch.index_select(x, 0, order, out=x.new_empty(len(order), *x.shape[1:], pin_memory=x.is_pinned()))

    def _keep(self, number: int, views: Any) -> Any:
        """``views``, kept for the next access where there is room and may be one."""
        storages = {part.data_ptr(): part.nbytes() for part in (x.untyped_storage() for x in _tensors(views))}
        size = sum(storages.values())  # both views may lie in one
        ahead = self._stream is not None and not self._kept  # made for nothing otherwise
        if ahead or (len(self) > 1 and size <= self._room):
            self._room -= size
            self._kept[number] = views
        return views


def _tensors(views: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(views) if isinstance(leaf, Tensor)]


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
    on_gpu = device.type == "cuda"
    beside = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
    copies = Copies() if on_gpu else None
    for batch in stream:
        micro_batches = MicroBatches(batch, views, device, micro_batch_size, groups, beside, copies=copies)
        micro_batches.prefetch()
        yield FedStep(batch.epoch, batch.bad, micro_batches)
