"""Worker processes that decode tiles into shared memory.

A fresh shared-memory tensor a chunk costs more than decoding it does where decoding is a copy (a page fault every 4 kB,
100 microseconds a 224 px tile), so chunks are written into a pool of slots that is mapped once, before the workers
fork. A slot is lent out with the tensor that shows it and taken back when the last tensor on it is gone. The pool is
anonymous memory, which the small /dev/shm of a container does not limit. Who holds on to more tensors than there are
slots gets tensors of their own.

Legend: R rows of a chunk, H, W height and width in pixels.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Generator, Iterable, Iterator, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

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
    """What is done for a request; a pure function of it, run in any worker."""

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
        """The first ``count`` rows as a tensor; the slot is free again when its memory is referred to no more."""
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
    def __init__(self, work: Work[Request, Answer], tile_size: tuple[int, int], pool: TilePool | None) -> None:
        self._work, self._tile_size, self._pool = work, tile_size, pool

    def __getitem__(self, item: tuple[Request, int]) -> _Item:
        request, slot = item
        count = self._work.rows(request)
        tiles: Tensor | None = None
        if self._pool is not None and slot != _NO_SLOT:
            rows_RHWC = self._pool.rows(slot, count)
        else:
            tiles = empty_tiles(count, self._tile_size, shared=get_worker_info() is not None)
            rows_RHWC = tiles.numpy()
        try:
            return _Item(self._work(request, rows_RHWC), count, tiles)
        except InputError as error:
            return _Item(None, count, error=str(error))


class _Requests(Sampler[tuple[Request, int]]):
    """Pairs each request with a free slot at the moment when it is handed to a worker."""

    def __init__(self, requests: Iterable[Request], pool: TilePool | None) -> None:
        self._requests, self._pool = requests, pool
        self.slots: list[int] = []
        """Slots of the requests that are on their way, oldest first."""

    def __iter__(self) -> Iterator[tuple[Request, int]]:
        for request in self._requests:
            slot = _NO_SLOT if self._pool is None else self._pool.take()
            self.slots.append(slot)
            yield request, slot

    def __len__(self) -> int:
        assert isinstance(self._requests, Sized)
        return len(self._requests)


def empty_tiles(count: int, tile_size: tuple[int, int], *, shared: bool) -> Tensor:
    """An uninitialised uint8 tensor (count, H, W, 3), in shared memory where a worker fills it for its parent."""
    height, width = tile_size
    if not shared:
        return torch.empty((count, height, width, 3), dtype=torch.uint8)
    # As torch's default_collate does: sharing an ordinary tensor afterwards would copy it.
    storage = torch.UntypedStorage._new_shared(count * height * width * 3, device="cpu")  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, height, width, 3)


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
        workers = workers if workers and processes_can_share() else 0
        self._work, self._tile_size, self._workers = work, tile_size, workers
        # Beside what the workers fill: the chunk that is used, and the one that is about to be.
        self._pool = TilePool(_PREFETCH * workers + 2, rows, tile_size) if workers else None

    def answers(self, requests: Iterable[Request]) -> Generator[tuple[Answer, Tensor], None, None]:
        """Yield (answer, tiles uint8 (R, H, W, 3)) of each request, in order.

        Raises:
            InputError: as ``work`` raised it, whichever process it ran in.
        """
        sampler = _Requests(requests, self._pool)
        with starting_workers():
            items = iter(self._loader(sampler))
        try:
            for item in items:
                slot = sampler.slots.pop(0)
                if item.error is not None:
                    self._give_back([slot])
                    raise InputError(item.error)
                yield item.answer, self._tiles(item, slot)
        finally:
            # Not left to the garbage collector: it may run in any thread, or in a forked child that inherited this.
            shut_down = getattr(items, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
            self._give_back(sampler.slots)

    def _loader(self, sampler: Sampler[tuple[Request, int]]) -> DataLoader[_Item]:
        options: dict[str, Any] = {}
        if self._workers:
            # The pool is inherited, so fork it must be (the default before Python 3.14).
            options = {
                "prefetch_factor": _PREFETCH,
                "multiprocessing_context": "fork",
                "worker_init_fn": partial(begin_worker, outlives_sigterm=True),
            }
        dataset = _WorkDataset(self._work, self._tile_size, self._pool)
        return DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=self._workers, collate_fn=_as_is, **options
        )

    def _tiles(self, item: _Item, slot: int) -> Tensor:
        if item.tiles is None:
            assert self._pool is not None and slot != _NO_SLOT
            return self._pool.lend(slot, item.count)
        self._give_back([slot])
        return item.tiles

    def _give_back(self, slots: list[int]) -> None:
        if self._pool is not None:
            for slot in slots:
                self._pool.give_back(slot)


def _as_is(item: Any) -> Any:
    return item
