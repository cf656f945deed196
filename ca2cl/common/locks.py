"""Exclusive locks between processes.

Not filelock: it locks by ``flock`` alone, which forked workers inherit, and empties the lock's file. A version of this
package that is in use already takes record locks in job folders, and the cache's lock files have a length that counts.
"""

from __future__ import annotations

import fcntl
import functools
import logging
import math
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
_FLOCK = "hhqqi"
"""C's ``struct flock``: type, whence, start, length, process id."""


class Locked(Exception):
    """Another process holds the lock; the text says which, as far as that is known."""


@contextmanager
def exclusive_lock(
    path: Path, timeout: float = math.inf, *, waiting: str = "", per_process: bool = True, required: bool = False
) -> Iterator[IO[bytes]]:
    """Hold the lock whose file is ``path``. File and folder are made if missing; a file that is there keeps its time.

    Args:
        timeout: seconds to wait for another holder.
        waiting: what to log before waiting.
        per_process: take a record lock, which ends with this process even if forked workers live on, but excludes no
            thread of it, and ends when any descriptor of the file is closed. Else a lock of the open file (flock).
        required: raise where the file system has no locks; else a warning, and no lock.

    Yields:
        The open file.

    Raises:
        Locked: another process holds the lock for longer than ``timeout``.
        OSError: the file cannot be made.
    """
    deadline = time.monotonic() + timeout
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)  # again: a holder that was refused removes its new folder
        with path.open("ab") as file:  # "wb" would change its time
            try:
                _acquire(file, deadline, waiting, per_process)
            except OSError as error:
                if required:
                    raise
                _warn_unlocked(path.parent, error.strerror)
            if _is_at(file, path):  # or the holder has removed the file, and the next to come makes a new one
                yield file
                return


def _acquire(file: IO[bytes], deadline: float, waiting: str, per_process: bool) -> None:
    lock = fcntl.lockf if per_process else fcntl.flock
    while True:
        try:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            holder = _holder(file)
        if time.monotonic() >= deadline:
            raise Locked(holder)
        if waiting:
            logger.info("%s%s", waiting, holder)
            waiting = ""
        if deadline == math.inf:
            lock(file, fcntl.LOCK_EX)
            return
        time.sleep(0.2)


def _holder(file: IO[bytes]) -> str:
    """The process that has a record lock, in brackets; empty for one on another machine and for flock."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    *_, process = struct.unpack(_FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    return f" (process {process})" if process > 0 else ""


def _is_at(file: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


@functools.cache
def _warn_unlocked(folder: Path, reason: str) -> None:
    """Once for each folder."""
    logger.warning("%s: cannot be locked (%s); do not run two jobs in it", folder, reason)
