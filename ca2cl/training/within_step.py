"""Abandon a step between micro-batches, on all ranks or none.

A step of many micro-batches may take longer than a scheduler waits. Ranks that exchange embeddings, statistics or
gradients may only leave it together: so each time that a method asks for a micro-batch, which it does on every rank in
the same order, they agree. They do so on the host, over gloo: a GPU goes on with what it has been given. Inside of a
micro-batch, with collectives under way, no rank can leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from ca2cl.runtime.signals import GivenUp, StopFlag


class StepExit:
    """Agreement of a job's ``world`` processes on abandoning a step; made by ``step_exit``."""

    def __init__(self, stop: StopFlag, world: int) -> None:
        self._stop, self._world = stop, world
        self._group: Any = None

    def watch(self, micro_batches: Sequence[Any], *, first: bool) -> Sequence[Any]:
        """The same micro-batches, each of which raises ``GivenUp`` on access once a signal asks to abandon the step.

        Args:
            first: it is the first step of this start.
        """
        if self._world > 1 and len(micro_batches) == 1:  # where it begins, ranks have just agreed
            return micro_batches
        return _Watched(micro_batches, self, first)

    def check(self, first: bool) -> None:
        """Every rank calls it.

        Raises:
            GivenUp: on every rank, where one has to leave.
        """
        leave, interrupted = self.total([self._stop.overdue(first=first), self._stop.interrupted])
        self._stop.interrupted |= interrupted > 0
        if leave:
            raise GivenUp

    def total(self, numbers: Sequence[float]) -> list[float]:
        """The sum over ranks, found on the host: a GPU goes on with what it has been given. Every rank calls it."""
        if self._world == 1:
            return list(numbers)
        if self._group is None and distributed.get_backend() != "gloo":
            self._group = distributed.new_group(backend="gloo")
        shared = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(shared, group=self._group)
        found: list[float] = shared.tolist()
        return found

    def close(self) -> None:
        """Destroy the process group."""
        if self._group is not None:
            distributed.destroy_process_group(self._group)


@contextmanager
def step_exit(stop: StopFlag, world: int) -> Iterator[StepExit]:
    """A ``StepExit`` for one training."""
    way = StepExit(stop, world)
    try:
        yield way
    finally:
        way.close()


class _Watched(Sequence[Any]):
    def __init__(self, micro_batches: Sequence[Any], way: StepExit, first: bool) -> None:
        self._micro_batches, self._way, self._first = micro_batches, way, first

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, int) and not -len(self) <= number < len(self):
            raise IndexError(number)
        self._way.check(self._first)
        return self._micro_batches[number]
