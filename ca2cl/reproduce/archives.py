"""Public archives: what a Zenodo record holds, and its files brought here whole.

A file grows as ``NAME.part`` and is asked for from where it ends (HTTP Range), through dropped connections and across
starts of the job; it takes its own name once its size and MD5 are the record's. Where a file of that name and size is
there already, ours or the user's, its MD5 is checked too, and it is never deleted.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

from ca2cl.common.files import sync_replace, writing
from ca2cl.data.remote.download import FetchPolicy
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)

POLICY = FetchPolicy(attempts=6, timeout=60.0, pause=2.0)
"""Attempts are those in a row that bring no new byte: a connection that drops every gigabyte is no reason to end."""
KEPT = "free space or give another folder and run again, what has come is kept"
_BLOCK = 1 << 16
"""Bytes that a broken connection loses at most: what has come of a block is gone with it."""
_BUSY = frozenset({408, 425, 429})  # with 5xx: come back later


@dataclass(frozen=True)
class Archive:
    """A file of a record."""

    name: str
    size: int
    """Bytes."""
    md5: str
    """32 hexadecimal digits."""
    url: str


class _Again(Exception):
    """An attempt that failed in a way that another one may not."""


def read_record(url: str, policy: FetchPolicy = POLICY) -> dict[str, Archive]:
    """The files of the record whose JSON is at ``url``, by name.

    Raises:
        InputError: it cannot be reached, or is not a record's JSON.
    """
    for attempt in range(policy.attempts):
        if attempt:
            time.sleep(policy.pause * 2 ** (attempt - 1))
        try:
            with _get(url, policy, {"Accept": "application/json"}) as answer:
                return _files(url, answer.json())
        except (_Again, requests.RequestException) as error:
            reason = _told(error)
            logger.warning("%s: attempt %d of %d failed: %s", url, attempt + 1, policy.attempts, reason)
    raise InputError(f"{url}: cannot be reached after {policy.attempts} attempts ({reason}); check --record_url and "
                     "the network, or put the archives' folders into data yourself")  # fmt: skip


def _files(url: str, content: Any) -> dict[str, Archive]:
    try:
        found = {}
        for entry in content["files"]:
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
    """Where a file that is not whole yet grows."""
    return target.with_name(f"{target.name}.part")


def download(archive: Archive, target: Path, policy: FetchPolicy = POLICY) -> None:
    """Bring ``archive`` to ``target``; where it is there already, it is checked alone.

    Raises:
        InputError: it cannot be had, has another size or MD5 than the record says, or the disk is full.
    """
    if target.exists() and target.stat().st_size == archive.size:
        digest = _md5(archive, target)
        if digest != archive.md5:
            raise InputError(
                f"{target}: not the published archive, its MD5 is {digest} and the record says {archive.md5}; move it "
                "away, and run again to download that one"
            )
        return
    part = part_of(target)
    longest, failures = _length(part), 0
    while _length(part) != archive.size:
        try:
            _go_on(archive, part, policy)
            reason = f"ended at byte {_length(part)} of {archive.size}"
        except (_Again, requests.RequestException) as error:
            reason = _told(error)
        if _length(part) == archive.size:
            break
        failures = 0 if _length(part) > longest else failures + 1
        longest = max(longest, _length(part))
        if failures >= policy.attempts:
            raise InputError(
                f"{archive.url}: {failures} attempts in a row brought nothing ({reason}); run again later, "
                f"{_length(part)} of {archive.size} bytes are kept in {part}"
            )
        logger.warning("%s: %s; going on", archive.name, reason)
        time.sleep(policy.pause * 2 ** max(0, failures - 1))
    digest = _md5(archive, part)
    if digest != archive.md5:
        part.unlink()
        raise InputError(
            f"{archive.name}: MD5 is {digest}, the record says {archive.md5}; it was deleted, run again to download it "
            "anew"
        )
    sync_replace(part, target, KEPT)


def _go_on(archive: Archive, part: Path, policy: FetchPolicy) -> None:
    """One request: append what is missing, from the start where the server does not know Range."""
    have = _length(part)
    if have > archive.size:
        part.unlink()  # not of this file
        have = 0
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    with _get(archive.url, policy, headers) as answer:
        if answer.status_code == 416 or (have and not _continues(answer, have)):
            have = 0
        if answer.status_code == 416:
            part.unlink(missing_ok=True)
            raise _Again("the server refuses to go on; starting over")
        with writing(part, KEPT):
            file = part.open("ab" if have else "wb")
        bar = tqdm(total=archive.size, initial=have, desc=archive.name, unit="B", unit_scale=True, disable=None)
        with file, bar:
            for block in answer.iter_content(_BLOCK):
                with writing(part, KEPT):
                    file.write(block)
                bar.update(len(block))
            with writing(part, KEPT):
                file.flush()


def _continues(answer: requests.Response, have: int) -> bool:
    return answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def _get(url: str, policy: FetchPolicy, headers: Mapping[str, str]) -> requests.Response:
    answer = requests.get(url, headers=dict(headers), stream=True, timeout=(policy.timeout, policy.timeout))
    if answer.status_code >= 500 or answer.status_code in _BUSY:
        raise _Again(f"HTTP {answer.status_code}")
    if answer.status_code >= 400 and answer.status_code != 416:
        raise InputError(f"{url}: HTTP {answer.status_code} ({answer.reason}); check --record_url")
    return answer


def _md5(archive: Archive, path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    bar = tqdm(total=archive.size, desc=f"MD5 of {archive.name}", unit="B", unit_scale=True, disable=None, leave=False)
    with path.open("rb") as file, bar:
        while block := file.read(_BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _told(error: Exception) -> str:
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    return " ".join(str(error).split())[:200] or type(error).__name__
