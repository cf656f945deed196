"""Share work, results and errors between the ranks of a launch.

They meet over gloo whatever they compute on: they exchange a few words at the start and at the end, so a GPU needs no
communicator of its own, and none spins while it waits for the slowest.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

from ca2cl.errors import InputError, LocalError
from ca2cl.runtime.launched import Place, find_place

T = TypeVar("T")

_PATIENCE = timedelta(days=30)
"""Longest wait of the first rank to finish for the last. A process that dies is noticed at once: its connection closes.
"""


class Ranks:
    """This process's number ``rank`` among the ``world`` processes of the launch; 0 of 1 without a launcher.

    Raises:
        LocalError: the processes do not find one another.
    """

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self._group: Any = None
        place = find_place()
        if place.world > 1:
            self.rank, self.world, self._group = _join(place)

    def share(self, value: Any) -> list[Any]:
        """The ``value`` of every rank, in order of rank, on every rank.

        Raises:
            LocalError: another process is gone.
        """
        if self.world == 1:
            return [value]
        from torch.distributed import all_gather_object

        values: list[Any] = [None] * self.world
        try:
            all_gather_object(values, value, group=self._group)
            return values
        except RuntimeError as error:
            raise LocalError(
                f"another process of this job ended early ({str(error).splitlines()[0]}); its own line says why"
            ) from None

    def together(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on this rank; an InputError of it on any rank is raised on all of them."""
        result: T | None = None
        fault: str | None = None
        try:
            result = work()
        except InputError as error:
            fault = str(error)
        for rank, message in enumerate(self.share(fault)):
            if message is not None:
                raise InputError(f"rank {rank}: {message}" if rank else message)
        return cast(T, result)

    def from_first(self, work: Callable[[], T]) -> T:
        """The result of ``work`` on rank 0, for every rank; an InputError of it is raised on all of them."""
        result = self.together(lambda: work() if self.rank == 0 else None)
        return cast(T, self.share(result)[0])


def _join(place: Place) -> tuple[int, int, Any]:
    """This process's number, how many there are, and the group that they meet in (None: the one that all are in)."""
    from accelerate import PartialState
    from torch import distributed

    from ca2cl.runtime.accelerator import check_joined, unmet

    # Processes that train in the same job have met already, on their GPUs: then a group beside theirs.
    met = distributed.is_initialized()
    try:
        state = PartialState() if met else PartialState(cpu=True, backend="gloo", timeout=_PATIENCE)
        group = distributed.new_group(backend="gloo", timeout=_PATIENCE) if met else None
    except (RuntimeError, ValueError) as error:
        raise unmet(place, error) from None
    check_joined(place, state.num_processes)
    return place.rank, place.world, group
