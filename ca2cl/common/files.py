"""Files that are whole or absent after any crash, and write errors that users can act on."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from ca2cl.errors import InputError

logger = logging.getLogger(__name__)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def writing(path: Path, remedy: str) -> Iterator[None]:
    """Turn a failure to write ``path`` (full disk, no permission) into the user's one line.

    Args:
        remedy: how the line ends. Only the caller knows what is kept and where else the job may write.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}") from None


def write_atomic(path: Path, data: bytes, remedy: str) -> None:
    """Write ``data`` to ``path`` so that after any crash the file is whole or absent; ``remedy`` as in ``writing``.

    A file that holds just that already is left alone: a finished job that is started again changes nothing.
    """
    with writing(path, remedy):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with writing(path, remedy), replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` once it is written; after an error it leaves no trace."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_replace(temporary: Path, path: Path, remedy: str) -> None:
    """Bring a file that a library wrote to ``temporary`` to its place for good."""
    with writing(path, remedy):
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


@contextmanager
def fresh_folder(root: Path) -> Iterator[Path]:
    """A temporary folder beside ``root`` that takes its name when the block ends well and vanishes when it does not.

    Raises:
        InputError: ``root`` is a file or holds something already.
    """
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise InputError(f"{root}: exists and is not an empty folder; remove it or give another")
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{root.name}.", dir=root.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        os.replace(temporary, root)  # noqa: PTH105 - a rename onto an empty folder is what makes this atomic
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def alone(folder: Path, lock_name: str, remedy: str, patience: float = 0.0) -> Iterator[None]:
    """Make the folder and keep other jobs out of it; the lock goes with this process, however it ends.

    A record lock, not flock: decoding workers would inherit that one, and they outlive a killed parent by seconds.

    Args:
        patience: seconds that another job may take to get out.

    Raises:
        InputError: another job works in it, or it cannot be written.
    """
    deadline = time.monotonic() + patience
    while True:
        with writing(folder, remedy):
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / lock_name).open("a")  # "w" would give a finished job's folder another time
        with lock:
            _wait_for(lock, folder, deadline)
            if _is_at(lock, folder / lock_name):  # or who held it has taken the file away, and another makes a new one
                yield
                return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _wait_for(lock: IO[str], folder: Path, deadline: float) -> None:
    told = False
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except (BlockingIOError, PermissionError):
            left = deadline - time.monotonic()
            if left <= 0:
                raise InputError(f"{folder}: another job is writing here; wait for it, or end it") from None
        except OSError as error:  # file systems without locks
            logger.warning("%s: cannot be locked (%s); do not run two jobs in it", folder, error.strerror)
            return
        if not told:
            logger.info("%s: another job is writing here; waiting for it, %.0f s at most", folder, left)
        told = True
        time.sleep(0.2)
