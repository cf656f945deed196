"""Worker processes that decode tiles into shared memory.

A fresh shared-memory tensor a chunk costs more than decoding it does where decoding is a copy (a page fault every 4 kB,
100 microseconds a 224 px tile), so chunks are written into a pool of slots that is mapped once, before the workers
fork. A slot is in use as long as a tensor on it lives. The pool is anonymous memory, which the small /dev/shm of a
container does not limit. A caller that keeps more tensors than there are slots gets ordinary tensors.

Legend: R rows of a chunk, H, W height and width in pixels.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ca2cl.errors import InputError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers

Pixels = npt.NDArray[np.uint8]
Request = TypeVar("Request")
Answer = TypeVar("Answer")
RequestIn = TypeVar("RequestIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)

_PREFETCH = 2
"""Chunks that each worker has waiting or under way."""
_NO_SLOT = -1


class Work(Protocol[RequestIn, AnswerOut]):
    """The work for a request; a pure function of it, run in any worker."""

    def rows(self, request: RequestIn) -> int:
        """R, the tiles that the request asks for."""

    def __call__(self, request: RequestIn, tiles_RHWC: Pixels) -> AnswerOut:
        """Fill ``tiles_RHWC`` and return what else is known of the tiles (pickled, if from a worker)."""


class TilePool:
    """Slots of shared memory for ``rows`` tiles each. Memory is touched, and so taken, when a slot is first used."""

    def __init__(self, slots: int, rows: int, tile_size: tuple[int, int]) -> None:
        shape = (slots, rows, *tile_size, 3)
        memory = mmap.mmap(-1, max(1, int(np.prod(shape))))
        self._slots: Pixels = np.frombuffer(memory, np.uint8, int(np.prod(shape))).reshape(shape)
        self._free = list(range(slots))

    def take(self) -> int:
        """A free slot's number, or -1 if there is none."""
        return self._free.pop() if self._free else _NO_SLOT

    def give_back(self, slot: int) -> None:
        """Make a slot that was taken but not lent free again."""
        if slot != _NO_SLOT:
            self._free.append(slot)

    def rows(self, slot: int, count: int) -> Pixels:
        """The first ``count`` rows of a slot, for a worker to fill."""
        rows: Pixels = self._slots[slot, :count]
        return rows

    def lend(self, slot: int, count: int) -> Tensor:
        """The first ``count`` rows as a tensor; the slot is free again when nothing refers to its memory."""
        view = self.rows(slot, count)
        tensor = torch.from_numpy(view)
        # The tensor's storage, and so every view of it, keeps this very array object alive.
        weakref.finalize(view, self._free.append, slot).atexit = False
        return tensor


@dataclass(frozen=True)
class _Item:
    """A worker's answer. ``tiles`` are there only where they are not in the slot; ``error`` is an InputError's one
    line, which the DataLoader would bury in a traceback."""

    answer: Any
    count: int
    tiles: Tensor | None = None
    error: str | None = None


class _WorkDataset(Dataset[_Item], Generic[Request, Answer]):
    def __init__(self, work: Work[Request, Answer], tile_size: tuple[int, int], pool: TilePool) -> None:
        self._work, self._tile_size, self._pool = work, tile_size, pool

    def __getitem__(self, item: tuple[Request, int]) -> _Item:
        request, slot = item
        count = self._work.rows(request)
        tiles = torch.empty((count, *self._tile_size, 3), dtype=torch.uint8) if slot == _NO_SLOT else None
        rows_RHWC = self._pool.rows(slot, count) if tiles is None else tiles.numpy()
        try:
            return _Item(self._work(request, rows_RHWC), count, tiles)
        except InputError as error:
            return _Item(None, count, error=str(error))


class TileWorkers(Generic[Request, Answer]):
    """Runs ``work`` over requests, in order, in ``workers`` processes (0: in this one).

    Args:
        work: what to do for a request.
        rows: most tiles that a request asks for.
        tile_size: height and width in pixels.
        workers: processes; none where they cannot share memory. They compute with one intra-op thread, and end with the
            generator or with their parent.
    """

    def __init__(self, work: Work[Request, Answer], rows: int, tile_size: tuple[int, int], workers: int) -> None:
        self._workers = workers if workers and processes_can_share() else 0
        # Beside what the workers fill: the chunk that is used, and the one that is about to be.
        self._pool = TilePool(_PREFETCH * self._workers + 2, rows, tile_size)
        self._dataset = _WorkDataset(work, tile_size, self._pool)

    def answers(self, requests: Iterable[Request]) -> Generator[tuple[Answer, Tensor], None, None]:
        """Yield (answer, tiles uint8 (R, H, W, 3)) of each request, in order.

        Raises:
            InputError: as ``work`` raised it, whichever process it ran in.
        """
        under_way = deque[int]()  # slots of the requests that are with the workers, oldest first

        def with_slots() -> Iterator[tuple[Request, int]]:
            """Pair each request with a free slot at the moment when it is handed to a worker."""
            for request in requests:
                under_way.append(self._pool.take())
                yield request, under_way[-1]

        with starting_workers():
            items = iter(self._loader(with_slots()))
        try:
            for item in items:
                if item.error is not None:
                    raise InputError(item.error)
                slot = under_way.popleft()
                yield item.answer, self._pool.lend(slot, item.count) if item.tiles is None else item.tiles
        finally:
            # Not left to the garbage collector: it may run in any thread, or in a forked child that inherited this.
            shut_down = getattr(items, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
            for slot in under_way:
                self._pool.give_back(slot)

    def _loader(self, requests: Iterator[tuple[Request, int]]) -> DataLoader[_Item]:
        return DataLoader(
            self._dataset,
            batch_size=None,
            sampler=requests,
            num_workers=self._workers,
            prefetch_factor=_PREFETCH if self._workers else None,
            # The pool is inherited, so fork it must be (the default before Python 3.14).
            multiprocessing_context="fork" if self._workers else None,
            worker_init_fn=partial(begin_worker, outlives_sigterm=True),
        )
