"""Bytes of shards, from a local folder or through fsspec (``http(s)://``, ``s3://``, ``gs://``, ``hf://``, ...).

A remote shard is fetched whole, once, into a local cache and read there: lanes read it sample by sample in permuted
order, which as range requests would cost one round trip a tile. Fetching writes to a temporary name, checks size and
SHA-256 against the index, and renames; a failed or silent transfer starts again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2cl.data.index import INDEX_NAME, MANIFEST_NAME, ShardIndex, read_manifest
from ca2cl.errors import InputError
from ca2cl.redact import redact

logger = logging.getLogger(__name__)

_BLOCK = 4 * 2**20


@dataclass(frozen=True, kw_only=True)
class FetchPolicy:
    """How hard a remote file is tried."""

    attempts: int = 4
    """Transfers that are started before giving up."""
    timeout: float = 60.0
    """Seconds without a new byte after which a transfer counts as dead."""
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""


def is_remote(root: str | Path) -> bool:
    """Whether ``root`` is a URL rather than a local path."""
    return "://" in str(root)


def file_url(root: str, name: str) -> str:
    """URL of a file in the folder that ``root`` names; a query (a token, a signature) stays behind the path."""
    if not root.startswith(("http://", "https://")):
        return f"{root.rstrip('/')}/{name}"
    folder, mark, query = root.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _without_secrets(root: str) -> str:
    """What names the same folder tomorrow, when its password or token is another."""
    return redact(root).partition("?")[0].rstrip("/")


def open_index(root: str | Path, cache_dir: str | Path | None = None, policy: FetchPolicy | None = None) -> ShardIndex:
    """Open the index of a shard folder, fetching it and the manifest first if ``root`` is a URL.

    Args:
        root: local folder or URL that ``ca2cl shard`` wrote.
        cache_dir: local folder for remote files; needed for a URL. One folder may serve many data sets: the files of
            each lie under a name made of its URL and its manifest's digest.
        policy: retries and timeout.

    Returns:
        The index; its ``root`` is the local folder that holds it.

    Raises:
        InputError: no such folder, damaged files, an unreachable store, or a URL without ``cache_dir``.
    """
    if not is_remote(root):
        return ShardIndex(root)
    if cache_dir is None:
        raise InputError(
            f"data.cache_dir is none: {redact(str(root))} is remote; give a local folder with --data.cache_dir"
        )
    base, policy = str(root).rstrip("/"), policy or FetchPolicy()
    url_hash = hashlib.blake2b(_without_secrets(base).encode(), digest_size=8).hexdigest()
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache_dir):
            pass
    except OSError as error:
        raise InputError(
            f"data.cache_dir is {str(cache_dir)!r}: {error.strerror}; use a folder you can write"
        ) from None
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".manifest-") as scratch:
        # Always fetched anew: it is small, and its digest says whether the cached rest still belongs to it.
        manifest = Path(scratch) / MANIFEST_NAME
        _fetch(file_url(base, MANIFEST_NAME), manifest, policy)
        folder = Path(cache_dir) / f"{url_hash}-{read_manifest(manifest).digest[:16]}"
        folder.mkdir(exist_ok=True)
        manifest.replace(folder / MANIFEST_NAME)
    with _locked(folder / INDEX_NAME):
        if not (folder / INDEX_NAME).exists():
            _fetch(file_url(base, INDEX_NAME), folder / INDEX_NAME, policy)
    return ShardIndex(folder)


class ShardReader:
    """Reads samples' bytes out of shards.

    Args:
        root: local folder or URL that ``ca2cl shard`` wrote.
        cache_dir: local folder for remote shards; needed for a URL.
        index: the folder's index where it is open already; otherwise it is opened.
        policy: retries and timeout of remote shards.
        open_files: file descriptors that are kept open.

    It may be inherited by forked workers (descriptors are read at absolute positions, never moved) and pickled to
    others (they open their own). Not for use by several threads at once.

    Raises:
        InputError: as ``open_index``.
    """

    def __init__(
        self,
        root: str | Path,
        cache_dir: str | Path | None = None,
        *,
        index: ShardIndex | None = None,
        policy: FetchPolicy | None = None,
        open_files: int = 256,
    ) -> None:
        self.root, self.policy = str(root).rstrip("/"), policy or FetchPolicy()
        index = index if index is not None else open_index(root, cache_dir, self.policy)
        self.folder = Path(index.root)
        self._expected = {shard.name: (shard.bytes, shard.sha256) for shard in index.shards}
        self._open_files = open_files
        self._files: OrderedDict[str, int] = OrderedDict()

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """``size`` bytes of shard ``shard`` from byte ``offset`` on.

        Raises:
            InputError: the shard is missing, unreadable, truncated or of another size than the index says.
        """
        try:
            data = os.pread(self._descriptor(shard), size, offset)
        except OSError as error:
            raise InputError(f"{self.folder / shard}: cannot be read ({error.strerror or error})") from None
        if len(data) != size:
            raise InputError(
                f"{self.folder / shard}: ends at byte {offset + len(data)}, a sample reaches to {offset + size}; "
                "the shard is truncated, copy it again"
            )
        return data

    def close(self) -> None:
        """Close all descriptors; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        # A reader that failed to open has no files yet.
        if hasattr(self, "_files"):
            self.close()

    def _descriptor(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.folder / shard
        if is_remote(self.root):
            self._ensure_cached(path)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._files[shard] = descriptor
        self._check_size(path, os.fstat(descriptor).st_size)
        if len(self._files) > self._open_files:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _check_size(self, path: Path, found: int) -> None:
        expected = self._expected.get(path.name, (found, ""))[0]
        if found != expected:
            raise InputError(
                f"{path}: {found} bytes, the index says {expected}; the shard is truncated or was changed: "
                "copy it again, or write the folder again with `ca2cl shard`"
            )

    def _ensure_cached(self, path: Path) -> None:
        if path.exists():
            return
        size, digest = self._expected[path.name]
        with _locked(path):
            if not path.exists():
                _fetch(file_url(self.root, path.name), path, self.policy, size, digest)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the cache's lock on ``path``, so that processes sharing the cache fetch a file once and not each."""
    with path.with_name(f".{path.name}.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class _Transfer(threading.Thread):
    """One attempt to copy a remote file. A thread, since no fsspec store promises a timeout that covers every call."""

    def __init__(self, url: str, part: Path) -> None:
        super().__init__(daemon=True, name=f"fetch {redact(url)}")
        self.url, self.part = url, part
        self.received = 0
        self.error: BaseException | None = None
        self.abandoned = False

    def run(self) -> None:
        from fsspec.callbacks import Callback
        from fsspec.core import url_to_fs

        transfer = self

        class Progress(Callback):
            def relative_update(self, inc: int = 1) -> None:
                transfer.received += inc
                if transfer.abandoned:
                    raise TimeoutError("abandoned")

        try:
            store, path = url_to_fs(self.url)
            store.get_file(path, str(self.part), callback=Progress())
        except BaseException as error:  # noqa: BLE001 - carried to the thread that waits, which raises it
            self.error = error

    def wait(self, timeout: float) -> None:
        """Wait until done.

        Raises:
            TimeoutError: no byte came for ``timeout`` seconds.
        """
        self.start()
        received, since = -1, time.monotonic()
        while self.is_alive():
            self.join(0.05 if timeout < 5 else 0.5)
            if self.received != received:
                received, since = self.received, time.monotonic()
            elif time.monotonic() - since > timeout:
                self.abandoned = True
                raise TimeoutError(f"no data for {timeout:g} s")
        if self.error is not None:
            raise self.error


def _fetch(url: str, target: Path, policy: FetchPolicy, size: int | None = None, sha256: str | None = None) -> None:
    """Copy a remote file to ``target``, atomically, checked against ``size`` and ``sha256`` where given.

    Raises:
        InputError: every attempt failed.
    """
    reason, shown = "no attempt was made", redact(url)
    for attempt in range(policy.attempts):
        if attempt:
            time.sleep(policy.pause * 2 ** (attempt - 1))
        part = target.with_name(f".{target.name}.{os.getpid()}.{attempt}.part")
        transfer = _Transfer(url, part)
        try:
            transfer.wait(policy.timeout)
            _check_part(part, size, sha256)
            part.replace(target)
            return
        except ImportError as error:
            raise InputError(f"{shown}: {_told(error, url)}") from None
        except Exception as error:  # noqa: BLE001 - every store has its own errors; all of them are tried again
            if isinstance(error, ValueError) and "Protocol not known" in str(error):
                raise InputError(
                    f"{shown}: no store of this kind; use a path, http(s)://, s3://, gs:// or hf://"
                ) from None
            # fsspec reports a refused connection as a missing file too, but then with the cause attached.
            if isinstance(error, FileNotFoundError) and error.__cause__ is None:
                raise InputError(f"{shown}: not found; give a URL under which `ca2cl shard` wrote") from None
            reason = _told(error, url)
            logger.warning("%s: attempt %d of %d failed: %s", shown, attempt + 1, policy.attempts, reason)
        finally:
            part.unlink(missing_ok=True)
    raise InputError(
        f"{shown}: cannot be fetched after {policy.attempts} attempts ({reason}); check address and network"
    )


def _told(error: BaseException, url: str) -> str:
    """An error in one line, without what is secret in ``url`` or in others."""
    text = " ".join(str(error).split()) or type(error).__name__
    return redact(text.replace(url, redact(url)))


def _check_part(part: Path, size: int | None, sha256: str | None) -> None:
    found = part.stat().st_size
    if size is not None and found != size:
        raise OSError(f"{found} bytes came, the index says {size}")
    if sha256 is not None:
        digest = hashlib.sha256()
        with part.open("rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise OSError("its SHA-256 differs from the index's")
