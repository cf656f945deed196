"""Worker processes that decode tiles into shared memory.

Fresh memory costs more than decoding does where decoding is a copy (a page fault every 4 kB, 100 microseconds a 224 px
tile), so tiles are written into a pool of slots that is mapped once, before the workers fork. A slot takes a whole
batch, which several workers fill: nobody copies a tile after it has been decoded. A slot is in use as long as a tensor
on it lives. The pool is anonymous memory, which the small /dev/shm of a container does not limit, and which is gone
with the last process that has it mapped. A caller that keeps more tensors than there are slots gets ordinary tensors.

Legend: R rows of a batch, H, W height and width in pixels.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
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

logger = logging.getLogger(__name__)
Pixels = npt.NDArray[np.uint8]
Request = TypeVar("Request")
Answer = TypeVar("Answer")
RequestIn = TypeVar("RequestIn", contravariant=True)
AnswerOut = TypeVar("AnswerOut", covariant=True)

_PREFETCH = 2
"""Requests that each worker has waiting or under way."""
_NO_SLOT = -1
_PORTABLE = 1
"""cudaHostRegisterPortable: page-locked for every CUDA context of the process."""


class Work(Protocol[RequestIn, AnswerOut]):
    """The work for a request; a pure function of it, run in any worker."""

    def rows(self, request: RequestIn) -> int:
        """R, the tiles that the request asks for."""

    def __call__(self, request: RequestIn, tiles_RHWC: Pixels) -> AnswerOut:
        """Fill ``tiles_RHWC`` and return what else is known of the tiles (pickled, if from a worker)."""


class TilePool:
    """Slots of shared memory for ``rows`` tiles each. Memory is touched, and so taken, when a slot is first used.

    Args:
        slots: how many.
        rows: tiles of a slot.
        tile_size: height and width in pixels.
        pin: page-lock all slots when the first is lent, so that copies to a GPU are asynchronous. Whoever makes such a
            copy keeps the tensor until the copy is done.
    """

    def __init__(self, slots: int, rows: int, tile_size: tuple[int, int], *, pin: bool = False) -> None:
        shape = (slots, rows, *tile_size, 3)
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, math.prod(shape))), np.uint8, math.prod(shape))
        self._slots: Pixels = self._memory.reshape(shape)
        self._free = list(range(slots))
        self._pin = pin

    def take(self) -> int:
        """A free slot's number, or -1 if there is none."""
        return self._free.pop() if self._free else _NO_SLOT

    def give_back(self, slot: int) -> None:
        """Make a slot that was taken but not lent free again."""
        if slot != _NO_SLOT:
            self._free.append(slot)

    def rows(self, slot: int, count: int, first: int = 0) -> Pixels:
        """``count`` rows of a slot from ``first`` on, for a worker to fill."""
        rows: Pixels = self._slots[slot, first : first + count]
        return rows

    def lend(self, slot: int, count: int) -> Tensor:
        """The first ``count`` rows as a tensor; the slot is free again when nothing refers to its memory."""
        if self._pin:
            self._pin = False
            _page_lock(self._memory)
        view = self.rows(slot, count)
        tensor = torch.from_numpy(view)
        # The tensor's storage, and so every view of it, keeps this very array object alive.
        weakref.finalize(view, self._free.append, slot).atexit = False
        return tensor


def _page_lock(memory: Pixels) -> None:
    """Page-lock ``memory`` until it is freed. Where that fails, copies to the GPU wait for the host."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    address = memory.ctypes.data
    error = int(runtime.cudaHostRegister(address, memory.nbytes, _PORTABLE))
    if error:
        logger.warning(
            "%.1f GB of tiles cannot be page-locked (CUDA error %d): copies to the GPU are slower", memory.nbytes / 1e9,
            error,
        )  # fmt: skip
        with suppress(RuntimeError):  # the error waits for the next kernel, whose fault it is not
            torch.ones(1, device="cuda")
        return
    # Called when the array goes, before the mapping that it keeps alive.
    weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False


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

    def __getitem__(self, item: tuple[Request, int, int]) -> _Item:
        request, slot, first = item
        count = self._work.rows(request)
        tiles = torch.empty((count, *self._tile_size, 3), dtype=torch.uint8) if slot == _NO_SLOT else None
        rows_RHWC = self._pool.rows(slot, count, first) if tiles is None else tiles.numpy()
        try:
            return _Item(self._work(request, rows_RHWC), count, tiles)
        except InputError as error:
            return _Item(None, count, error=str(error))


class TileWorkers(Generic[Request, Answer]):
    """Runs ``work`` over requests, in order, in ``workers`` processes (0: in this one).

    Args:
        work: what to do for a request.
        rows: most tiles of a batch.
        tile_size: height and width in pixels.
        workers: processes; none where they cannot share memory. They compute with one intra-op thread, and end with the
            generator or with their parent.
        requests: of which a batch consists; the last batch may have fewer.
        pin: page-lock the batches, as ``TilePool`` does.
    """

    def __init__(
        self,
        work: Work[Request, Answer],
        rows: int,
        tile_size: tuple[int, int],
        workers: int,
        *,
        requests: int = 1,
        pin: bool = False,
    ) -> None:
        self._work = work
        self._workers = workers if workers and processes_can_share() else 0
        # Beside what the workers fill: the batch that is used, and the one that is about to be. On a GPU another one,
        # from which a copy may be under way.
        ahead = -(-_PREFETCH * self._workers // requests)
        self._pool = TilePool(ahead + 2 + pin, rows, tile_size, pin=pin)
        self._dataset = _WorkDataset(work, tile_size, self._pool)

    def answers(self, requests: Iterable[Request]) -> Generator[tuple[Answer, Tensor], None, None]:
        """Yield (answer, tiles uint8 (R, H, W, 3)) of each request, in order.

        Raises:
            InputError: as ``work`` raised it, whichever process it ran in.
        """
        with closing(self.batches([request] for request in requests)) as batches:
            for (answer,), tiles in batches:
                yield answer, tiles
                del tiles  # or its slot is in use while the next batch is waited for

    def batches(self, batches: Iterable[Sequence[Request]]) -> Generator[tuple[list[Answer], Tensor], None, None]:
        """Yield the answers of each batch's requests, and their tiles uint8 (R, H, W, 3) one after another.

        Raises:
            InputError: as ``work`` raised it, whichever process it ran in.
        """
        under_way = deque[tuple[int, int]]()  # slot and requests of the batches that are with the workers, oldest first

        def with_slots() -> Iterator[tuple[Request, int, int]]:
            """Pair each request with its place in a free slot at the moment when it is handed to a worker."""
            for batch in batches:
                slot, first = self._pool.take(), 0
                under_way.append((slot, len(batch)))
                for request in batch:
                    yield request, slot, first
                    first += self._work.rows(request)

        with starting_workers():
            items = iter(self._loader(with_slots()))
        done: list[_Item] = []
        try:
            for item in items:
                if item.error is not None:
                    raise InputError(item.error)
                done.append(item)
                if len(done) == under_way[0][1]:
                    slot, _ = under_way.popleft()
                    yield [part.answer for part in done], self._tiles(slot, done)
                    done = []
        finally:
            # Not left to the garbage collector: it may run in any thread, or in a forked child that inherited this.
            shut_down = getattr(items, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
            for slot, _ in under_way:
                self._pool.give_back(slot)

    def _tiles(self, slot: int, done: Sequence[_Item]) -> Tensor:
        """A batch's tiles: its slot, or where there was none, what the workers put elsewhere."""
        if slot != _NO_SLOT:
            return self._pool.lend(slot, sum(part.count for part in done))
        return torch.cat([part.tiles for part in done if part.tiles is not None])

    def _loader(self, requests: Iterator[tuple[Request, int, int]]) -> DataLoader[_Item]:
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
