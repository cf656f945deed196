"""Unpack zip archives safely and atomically."""

from __future__ import annotations

import shutil
import stat
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import fsync, writing
from ca2cl.data.sources.names import is_clutter
from ca2cl.errors import InputError
from ca2cl.reproduce.archives import KEPT, check_space


def unpack(archive: Path, target: Path) -> None:
    """Unpack ``archive`` so that its folder of the same name, or all of it where there is none, is ``target``.

    Files go into a hidden folder beside ``target`` first, which takes its name once the last of them is written.

    Raises:
        InputError: no zip, a damaged one, one with paths that leave the folder or with links, or a full disk.
    """
    scratch = target.with_name(f".{target.name}.unpacking")
    try:
        with zipfile.ZipFile(archive) as held:
            members = _members(archive, held)
            check_space(archive.parent, sum(member.file_size for member in members), f"unpacking {archive.name}")
            with writing(scratch, KEPT):
                shutil.rmtree(scratch, ignore_errors=True)  # of a job that was killed
                scratch.mkdir(parents=True)
            _extract(held, members, scratch)
        with writing(target, KEPT):
            inner = scratch / target.name
            (inner if inner.is_dir() else scratch).rename(target)
            fsync(target.parent)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{archive}: damaged ({error}); delete it and use --download") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _members(archive: Path, held: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """The files to write; all paths are looked at before the first is."""
    members = []
    for member in held.infolist():
        path = PurePosixPath(member.filename)
        link = stat.S_ISLNK(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename or link:
            kind = "a link" if link else "a path that leaves the folder"
            raise InputError(f"{archive}: {member.filename!r} is {kind}; this is not the published archive, delete it")
        if not member.is_dir() and not any(map(is_clutter, path.parts)):
            members.append(member)
    if not members:
        raise InputError(f"{archive}: holds no files; delete it and use --download")
    return members


def _extract(held: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], folder: Path) -> None:
    for member in ProgressBar(members, desc=f"unpack {Path(str(held.filename)).name}", unit="file", leave=False):
        with writing(folder / member.filename, KEPT):
            held.extract(member, folder)
