"""Download of the archives of a Zenodo record.

A file grows as ``NAME.part``, across starts of the job, and takes its own name once its size and MD5 are the record's.
A file of that name and size that is there already is checked by its MD5 too, and never deleted.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from ca2cl.common.files import file_digest, writing
from ca2cl.common.records import parse_json
from ca2cl.data.transfer.download import FetchPolicy, fetch
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)

POLICY = FetchPolicy(attempts=6, timeout=60.0, pause=2.0)
"""Attempts are those in a row that bring no new byte: a connection that drops every gigabyte is no reason to end."""
KEPT = "free space or give another folder and run again, what has come is kept"


@dataclass(frozen=True)
class Archive:
    """A file of a record."""

    name: str
    size: int
    """Bytes."""
    md5: str
    """32 hexadecimal digits."""
    url: str


def read_record(url: str, policy: FetchPolicy = POLICY) -> dict[str, Archive]:
    """The files of the record whose JSON is at ``url``, by name.

    Raises:
        InputError: it cannot be reached, or is not a record's JSON.
    """
    with TemporaryDirectory() as scratch, _see_record_url():
        path = Path(scratch) / "record.json"
        fetch(url, path, policy)
        return _files(url, path.read_bytes())


@contextmanager
def _see_record_url() -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{error}; see --record_url, or put the archives' folders into data yourself") from None


def _files(url: str, text: bytes) -> dict[str, Archive]:
    try:
        found = {}
        for entry in parse_json(text)["files"]:
            kind, _, digest = str(entry["checksum"]).partition(":")
            if kind != "md5" or len(digest) != 32:
                raise ValueError(f"checksum {entry['checksum']!r}")
            name = str(entry["key"])
            found[name] = Archive(name, int(entry["size"]), digest.lower(), str(entry["links"]["self"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{url}: not a record's JSON with files ({error!r}); check --record_url") from None
    return found


def choose(record: Mapping[str, Archive], name: str, url: str, known: Mapping[str, str]) -> Archive:
    """The archive ``name`` of a record.

    Args:
        known: MD5s that are known from elsewhere, by name.

    Raises:
        InputError: the record has none of that name, or another MD5 than the one known.
    """
    if name not in record:
        held = ", ".join(record) or "no files"
        raise InputError(f"{url}: the record has no {name}; it has {held}; check --record_url")
    archive = record[name]
    if known.get(name, archive.md5) != archive.md5:
        raise InputError(
            f"{url}: says that {name} has MD5 {archive.md5}, it is known to have {known[name]}; another version of the "
            "data is no reproduction: use --record_url for a record with the right one"
        )
    return archive


def check_space(folder: Path, needed: int, what: str) -> None:
    """Raise ``InputError`` where ``folder``'s disk has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: {what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; free space or give another "
            "folder"
        )


def part_of(target: Path) -> Path:
    """Path of a file whose download is not complete."""
    return target.with_name(f"{target.name}.part")


def download(archive: Archive, target: Path, policy: FetchPolicy = POLICY) -> None:
    """Bring ``archive`` to ``target``; where it is there already, it is checked alone.

    Raises:
        InputError: it cannot be had, has another size or MD5 than the record says, or the disk is full.
    """
    if target.exists() and target.stat().st_size == archive.size:
        logger.info("%s: checking its MD5", target)
        digest = file_digest(target, "md5")
        if digest != archive.md5:
            raise InputError(
                f"{target}: not the published archive, its MD5 is {digest} and the record says {archive.md5}; move it "
                "away, and run again to download that one"
            )
        return
    part = part_of(target)
    with writing(part, KEPT):
        part.open("ab").close()
    with _see_record_url():
        fetch(archive.url, target, policy, archive.size, f"md5:{archive.md5}", part)
