"""Local cache of remote shards, shared by processes, with a size limit.

A shard is fetched under its lock by one process and renamed into place, so every file without a leading dot is whole.
The lock is a file of the length of the shard that is being fetched, so that others count its bytes already. Shards that
were opened longest ago make room. Removing an open one is harmless: its readers keep it until they close it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ca2cl.common.locks import Locked, exclusive_lock
from ca2cl.data.transfer.download import parts_of
from ca2cl.data.transfer.errors import DiskFull
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)

SHARDS = "shards"
"""Name of the folder in a data set's cache that holds its tars."""
_ROOM_LOCK = ".room"
GB = 10**9


@dataclass(frozen=True)
class ShardCache:
    """Whole shards of one data set in ``folder``, below the cache ``root`` that several data sets may share.

    ``limit`` is the most bytes that the shards of all of them may take; None sets no limit.
    """

    root: Path
    folder: Path
    limit: int | None = None

    def open(self, name: str, size: int, fetch: Callable[[Path], None], release: Callable[[], None]) -> int:
        """A descriptor of shard ``name`` of ``size`` bytes, fetched if it is not in the cache.

        Args:
            name: of the shard.
            size: its bytes.
            fetch: downloads it to a path.
            release: closes the caller's descriptors of removed shards, which take their room until then.

        Raises:
            InputError: it cannot be fetched, or there is no room for it.
        """
        path = self.folder / name
        descriptor = self._whole(path, size)
        if descriptor is not None:
            return descriptor
        try:
            with locked(path) as lock:
                assert lock is not None
                descriptor = self._whole(path, size)  # another process may have fetched it by now
                if descriptor is None:
                    self._fetch(path, size, fetch, release, lock)
                    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); see --data.cache_dir") from None
        return descriptor

    def _whole(self, path: Path, size: int) -> int | None:
        """A descriptor of a cached shard; None if it is not there, or was damaged from outside and is now removed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        found = os.fstat(descriptor).st_size
        if found == size:
            with contextlib.suppress(OSError):  # another user's file
                os.utime(descriptor)
            return descriptor
        os.close(descriptor)
        logger.warning("%s: %d bytes instead of %d; fetched again", path, found, size)
        path.unlink(missing_ok=True)
        return None

    def _fetch(
        self, path: Path, size: int, fetch: Callable[[Path], None], release: Callable[[], None], lock: int
    ) -> None:
        for left in parts_of(path):
            left.unlink(missing_ok=True)
        if self.limit is not None:
            if size > self.limit:
                raise InputError(
                    f"data.cache_gb is {self.limit / GB:g}: {path.name} alone has {size / GB:g} GB; use at least a few "
                    "shards' size for each lane that this machine serves"
                )
            self._make_room(size, self.limit, lock)
            release()
        try:
            fetch(path)
        except DiskFull as full:
            freed = self._make_room(size, 0, lock)
            if not freed:
                raise
            logger.warning("%s; %.3g GB of other shards removed from the cache", full, freed / GB)
            release()
            fetch(path)

    def _make_room(self, size: int, limit: int, lock: int) -> int:
        """Remove shards until ``size`` more bytes are within ``limit``, and claim them; returns bytes removed.

        A limit of 0 removes ``size`` bytes, or all there are.
        """
        removed = 0
        with locked(self.root / _ROOM_LOCK):
            shards, claimed = self._held()
            total = claimed + sum(found.st_size for _, found in shards)
            for path, found in sorted(shards, key=lambda shard: shard[1].st_mtime_ns):
                if total + size <= limit or (not limit and removed >= size):
                    break
                if _remove(path):
                    total, removed = total - found.st_size, removed + found.st_size
            os.truncate(lock, size)
        return removed

    def _held(self) -> tuple[list[tuple[Path, os.stat_result]], int]:
        """All whole shards below the root, and the bytes of those that are being fetched."""
        shards, claimed = [], 0
        for folder in self.root.glob(f"*/{SHARDS}"):
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        if entry.name.endswith(".lock"):
                            claimed += _claimed(Path(entry.path), entry.stat().st_size)
                        elif not entry.name.startswith("."):
                            shards.append((Path(entry.path), entry.stat()))
        return shards, claimed


def _claimed(lock: Path, size: int) -> int:
    """Bytes of the shard that is being fetched under ``lock``; removes the parts that a killed process has left."""
    path = lock.with_name(lock.name.removeprefix(".").removesuffix(".lock"))
    with locked(path, wait=False) as free:
        for left in parts_of(path) if free is not None else ():
            left.unlink(missing_ok=True)
    return size if free is None else 0


def _remove(path: Path) -> bool:
    """Remove a shard, unless a process is about to open it."""
    with locked(path, wait=False) as lock:
        if lock is not None:
            path.unlink(missing_ok=True)
    return lock is not None


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[int | None]:
    """Hold the cache's lock on ``path``: a descriptor of the lock's file, or None where another holds it.

    The file is removed with the lock, or the locks of 10^5 shards would stay.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as held:
        try:
            # A lock of the file and not of the process: ``_claimed`` must also see the locks of its own process.
            file = held.enter_context(exclusive_lock(lock, math.inf if wait else 0.0, per_process=False, required=True))
        except Locked:
            yield None
            return
        held.callback(lock.unlink, missing_ok=True)
        yield file.fileno()
