"""Atomic files, and write errors that users can act on."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from ca2cl.errors import InputError


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file as hexadecimal digits, SHA-256 or another algorithm of ``hashlib``."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
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


def check_writable(path: Path, setting: str) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold the result of.

    Raises:
        InputError: it is a folder, or the nearest folder above it that exists is none that can be written.
    """
    folder = next(above for above in path.absolute().parents if above.exists())
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{setting} is {str(path)!r}: cannot be written; give a file in a folder you can write")


def write_atomic(path: Path, data: bytes, remedy: str) -> None:
    """Write ``data`` to ``path`` so that after any crash the file is whole or absent; ``remedy`` as in ``writing``.

    A file that holds just that already is left alone: a finished job that is started again changes nothing.
    """
    with writing(path, remedy):
        if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
            return
    with writing(path, remedy), replacing(path) as file:
        file.write(data)


def write_record(path: Path, record: Mapping[str, Any], remedy: str) -> None:
    """Write JSON for people and programs to ``path``, as ``write_atomic``."""
    write_atomic(path, (json.dumps(dict(record), indent=1) + "\n").encode(), remedy)


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
        fsync(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temporaries(folder: Path, remedy: str, name: str = "*") -> None:
    """Remove what killed writers of ``name`` left in ``folder``; nobody may write there now. ``remedy`` as above."""
    for temporary in folder.glob(f".{name}.tmp-*"):
        with writing(temporary, remedy):
            temporary.unlink(missing_ok=True)


def fsync(path: Path) -> None:
    """Make a file's content, or a rename in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(source: Path, target: Path) -> None:
    """A second name for a file that is never written again, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync_replace(temporary: Path, path: Path, remedy: str) -> None:
    """Bring a file that a library wrote to ``temporary`` to its place for good."""
    with writing(path, remedy):
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)


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
