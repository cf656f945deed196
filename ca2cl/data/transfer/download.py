"""Download remote files through fsspec: resumable, retried and atomic.

A transfer writes to a temporary name, is checked by size and digest where they are known, and is renamed into place.
One that broke off, or fell silent, goes on where it stopped if the store serves ranges, and else starts again. The
stores' own retries are switched off where that can be done, so that ``FetchPolicy`` alone decides.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.files import file_digest, fsync
from ca2cl.data.transfer.errors import passing, retry_after, shown
from ca2cl.errors import InputError

logger = logging.getLogger(__name__)

_PIECE = 2 * 2**20
"""Bytes of one request when a transfer goes on, except over http. An attempt that gained as many was not in vain."""
_PATIENCE = 4
"""A file is tried ``attempts`` times this often when every attempt gains something."""


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """Attempts, timeout and pauses of a download."""

    attempts: int = 5
    """Transfers in a row that fail without having gained much, before giving up."""
    timeout: float = 60.0
    """Seconds without a new byte after which a transfer counts as dead; also the longest pause that a server that
    answers with Retry-After is granted."""
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""


class _NoRange(Exception):
    """The server sends the file from its start, whatever was asked for."""


class _Spoilt(OSError):
    """The bytes that came are no part of the file: none is kept."""


def join(root: str, name: str) -> str:
    """The URL of ``name`` below ``root``; an http(s) URL's query (a signature) stays at the end."""
    if root.startswith(("http://", "https://")):
        parts = urlsplit(root)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
    return f"{root.rstrip('/')}/{name}"


def fetch(
    url: str, target: Path, policy: FetchPolicy, size: int | None = None, digest: str = "", kept: Path | None = None
) -> None:
    """Copy a remote file to ``target``, which holds all of it afterwards or does not exist.

    Args:
        url: of the file.
        target: local path. One process at a time may fetch to it.
        policy: retries and timeout.
        size: bytes that it must have, where known.
        digest: ``ALGORITHM:HEXADECIMAL``, where known.
        kept: of a large file, where what has come stays until all has, for another start to go on with. Attempts are
            then in vain that get no further than those before, a wrong digest is final, and a bar shows the progress.

    Raises:
        DiskFull: there is no room for it.
        InputError: it does not exist, may not be read, or was tried in vain ``policy.attempts`` times in a row.
    """
    number, in_vain = 0, 0
    transfer = _Transfer(url, kept or _part(target, 0), size, policy.timeout, _length(kept, size))
    longest = transfer.have
    bar = ProgressBar(total=size, desc=target.name, unit="B", unit_scale=True, disable=not kept)
    try:
        while True:
            number += 1
            try:
                transfer.wait(bar)
                _put_in_place(transfer.part, target, size, digest)
                return
            except Exception as error:  # noqa: BLE001 - every store has its own errors; what may pass is tried again
                reason = passing(error, url, target)
                if kept is not None and isinstance(error, _Spoilt):
                    kept.unlink()
                    raise InputError(f"{shown(url)}: {reason}; it was deleted, run again to download it anew") from None
                reached = transfer.have + transfer.received
                gained = transfer.received >= _PIECE if kept is None else reached > longest
                longest = max(longest, reached)
                in_vain = 1 if gained else in_vain + 1
                if in_vain >= policy.attempts or (kept is None and number >= _PATIENCE * policy.attempts):
                    raise InputError(
                        f"{shown(url)}: cannot be fetched after {number} attempts ({reason}); check address and network"
                    ) from None
                logger.warning("%s: attempt %d failed: %s", shown(url), number, reason)
                time.sleep(max(min(retry_after(error), policy.timeout), policy.pause * 2 ** (in_vain - 1)))
                transfer = transfer.next(kept or _part(target, number), keep=not isinstance(error, _Spoilt))
    finally:
        bar.close()
        transfer.abandoned = True
        if kept is None:
            transfer.part.unlink(missing_ok=True)


def parts_of(target: Path) -> Iterator[Path]:
    """Files that killed transfers to ``target`` have left."""
    return target.parent.glob(f".{target.name}.*.part")


def _length(kept: Path | None, size: int | None) -> int:
    """Bytes of a file of ``size`` bytes that are there; a longer one is another file, which is removed."""
    have = kept.stat().st_size if kept is not None and kept.exists() else 0
    if kept is not None and size is not None and have > size:
        kept.unlink()
        return 0
    return have


def _part(target: Path, number: int) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.{number}.part")


class _Transfer(threading.Thread):
    """One attempt to copy a remote file to ``part``, of which the first ``have`` bytes are there.

    A thread, since no fsspec store promises a timeout that covers every call.
    """

    def __init__(self, url: str, part: Path, size: int | None, timeout: float, have: int = 0) -> None:
        super().__init__(daemon=True, name="fetch")
        self.url, self.part, self.size, self.timeout, self.have = url, part, size, timeout, have
        self.received = 0
        self.error: BaseException | None = None
        self.abandoned = False
        self.ranges = True

    def run(self) -> None:
        try:
            from fsspec.core import url_to_fs

            if self.have and self.have == self.size:
                return
            store, path = url_to_fs(self.url, **_options(self.url, self.timeout))
            if not (self.have and self._go_on(store, path)):
                self._start(store, path)
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, which raises it
            self.error = error

    def _start(self, store: Any, path: str) -> None:
        self.have = 0
        store.get_file(path, str(self.part), callback=self._progress(None), **_in_order(store))

    def _progress(self, expected: int | None) -> Any:
        """Callback of a download that counts its bytes, and wants the server to announce ``expected`` if given."""
        from fsspec.callbacks import Callback

        transfer = self

        class Progress(Callback):
            def relative_update(self, inc: int = 1) -> None:
                if expected is not None and self.size != expected:
                    raise _NoRange
                transfer._gain(inc)

        return Progress()

    def _go_on(self, store: Any, path: str) -> bool:
        """Fetch what is missing; False where the store serves no ranges."""
        if "http" in _protocols(store) and self.size is not None:
            headers = {**store.kwargs.get("headers", {}), "Accept-Encoding": "identity", "Range": f"bytes={self.have}-"}
            with self.part.open("r+b") as file:  # one request for all of it: servers count requests
                file.seek(self.have)
                try:
                    store.get_file(path, file, callback=self._progress(self.size - self.have), headers=headers)
                except _NoRange:
                    self.ranges = False
            return self.ranges
        with store.open(path, "rb", block_size=_PIECE, cache_type="none") as source, self.part.open("r+b") as file:
            try:
                source.seek(file.seek(self.have))
                data = source.read(_PIECE)
            except ValueError:  # a stream
                self.ranges = False
                return False
            while data:
                file.write(data)
                self._gain(len(data))
                data = source.read(_PIECE)
        return True

    def _gain(self, count: int) -> None:
        self.received += count
        if self.abandoned:
            raise TimeoutError("abandoned")

    def wait(self, bar: ProgressBar) -> None:
        """Wait until done.

        Raises:
            TimeoutError: no byte came for ``timeout`` seconds.
        """
        self.start()
        received, since = -1, time.monotonic()
        while self.is_alive():
            self.join(0.05 if self.timeout < 5 else 0.5)
            bar.update(self.have + self.received - bar.n)
            if self.received != received:
                received, since = self.received, time.monotonic()
            elif time.monotonic() - since > self.timeout:
                self.abandoned = True
                raise TimeoutError(f"no data for {self.timeout:g} s")
        if self.error is not None:
            raise self.error

    def next(self, part: Path, keep: bool) -> _Transfer:
        """The attempt after this one, on a file of its own: a silent one may wake up and write to its. A kept file is
        too large to copy; there it can only write what belongs in that place."""
        have = self.part.stat().st_size if keep and self.ranges and self.part.exists() else 0
        # Stores that allocate the file first, or fill it out of order, leave more bytes than came: no beginning.
        have = have if have <= self.have + self.received else 0
        if have and part != self.part:
            shutil.copyfile(self.part, part)
        if have:
            os.truncate(part, have)
        if not have or part != self.part:
            self.part.unlink(missing_ok=True)
        return _Transfer(self.url, part, self.size, self.timeout, have)


def _options(url: str, timeout: float) -> dict[str, Any]:
    """Options of a URL's store: our timeout in place of its total one, no retries of its own. The user's settings in
    fsspec's configuration win."""
    from fsspec.config import conf

    scheme = url.partition("://")[0]
    options: dict[str, dict[str, Any]] = {}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=timeout, sock_read=timeout)}}
    elif scheme in ("s3", "s3a"):
        seconds = {"connect_timeout": timeout, "read_timeout": timeout}
        options = {"config_kwargs": {**seconds, "retries": {"mode": "standard", "total_max_attempts": 1}}}
    return {name: {**values, **conf.get(scheme, {}).get(name, {})} for name, values in options.items()}


def _in_order(store: Any) -> dict[str, int]:
    """Arguments for one stream from beginning to end. Several at once report progress only after a block of hundreds of
    megabytes, which on a slow line looks like a dead connection."""
    protocols = _protocols(store)
    if "s3" in protocols:
        return {"max_concurrency": 1}
    return {"concurrency": 1} if "gs" in protocols and hasattr(store, "_get_file_concurrent") else {}


def _protocols(store: Any) -> set[str]:
    return {store.protocol} if isinstance(store.protocol, str) else set(store.protocol)


def _put_in_place(part: Path, target: Path, size: int | None, digest: str) -> None:
    found = part.stat().st_size
    if size is not None and found != size:
        kind = OSError if found < size else _Spoilt
        raise kind(f"{found} bytes came, {size} are expected")
    algorithm, _, known = digest.partition(":")
    if known and (found_digest := file_digest(part, algorithm)) != known:
        raise _Spoilt(f"its {algorithm} is {found_digest}, and not {known}")
    fsync(part)
    part.replace(target)
    fsync(target.parent)
