"""Pool of spawned worker processes, or this process alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ca2cl.errors import InputError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers


class _HereExecutor(Executor):
    """Runs each task in this process, when it is submitted."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(task(*args, **named))
        except Exception as error:  # noqa: BLE001 - raised again by future.result()
            future.set_exception(error)
        return future


class _SpawnedExecutor(ProcessPoolExecutor):
    """Starts its processes with signals blocked, as ``begin_worker`` needs it."""

    def submit(self, task: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        with starting_workers():
            return super().submit(task, *args, **named)


@contextmanager
def process_pool(workers: int) -> Iterator[Executor]:
    """An executor of ``workers`` processes. When the block ends, tasks that were not yet started are dropped.

    Raises:
        InputError: a process was killed.
    """
    # spawned: a forked child would inherit the threads' locks of whatever the caller has loaded
    pool = _SpawnedExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=begin_worker)
    try:
        yield pool
    except BrokenProcessPool:
        raise InputError("a writing process was killed (out of memory?): use fewer --workers and run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def worker_pool(workers: int) -> Iterator[Executor]:
    """As ``process_pool``; one worker is this process, and so are all where processes cannot share memory."""
    if workers == 1 or not processes_can_share():
        yield _HereExecutor()
        return
    with process_pool(workers) as pool:
        yield pool
