"""Read bytes of shards from a local folder or through fsspec.

A remote shard is fetched whole into a local cache (``cache.py``) and read there: lanes read it sample by sample in
permuted order, which as range requests would cost one round trip a tile.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.data.remote.cache import GB, SHARDS, ShardCache, locked
from ca2cl.data.shards.index import INDEX_NAME, MANIFEST_NAME, ShardIndex, read_manifest
from ca2cl.data.shards.tar import find_member
from ca2cl.data.transfer.download import FetchPolicy, fetch, join
from ca2cl.data.transfer.errors import shown
from ca2cl.errors import InputError

_MOST_ABOUT = 16_384
"""Bytes behind a tile's image in which its ``.json`` is looked for."""


def is_remote(root: str | Path) -> bool:
    """True if ``root`` is a URL rather than a local path."""
    return "://" in str(root)


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
            f"data.cache_dir is none: {shown(str(root))} is remote; give a local folder with --data.cache_dir"
        )
    cache, policy = _writable(Path(cache_dir)), policy or FetchPolicy()
    try:
        folder = _fetch_manifest(str(root), cache, policy)
        with locked(folder / INDEX_NAME):
            if not (folder / INDEX_NAME).exists():
                fetch(join(str(root), INDEX_NAME), folder / INDEX_NAME, policy)
    except OSError as error:
        raise InputError(f"{cache}: cannot be written ({error.strerror}); see --data.cache_dir") from None
    try:
        return ShardIndex(folder)
    except InputError:  # perhaps it was cut short on its way: the next start fetches it anew
        (folder / INDEX_NAME).unlink(missing_ok=True)
        raise


def _writable(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except OSError as error:
        raise InputError(f"data.cache_dir is {str(cache)!r}: {error.strerror}; use a folder you can write") from None


def _fetch_manifest(root: str, cache: Path, policy: FetchPolicy) -> Path:
    """Fetch the manifest below the URL ``root``; returns the folder in the cache of the data that it describes."""
    # A signature in the query is another one tomorrow, for the same data.
    url_hash = hashlib.blake2b(shown(root).rstrip("/").encode(), digest_size=8).hexdigest()
    with tempfile.TemporaryDirectory(dir=cache, prefix=".manifest-") as scratch:
        # Always fetched anew: it is small, and the cached rest belongs to it only if its digest is still the same.
        manifest = Path(scratch) / MANIFEST_NAME
        fetch(join(root, MANIFEST_NAME), manifest, policy)
        folder = cache / f"{url_hash}-{read_manifest(manifest).digest[:16]}"
        folder.mkdir(exist_ok=True)
        manifest.replace(folder / MANIFEST_NAME)
    return folder


class ShardReader:
    """Reads samples' bytes out of shards.

    Args:
        root: local folder or URL that ``ca2cl shard`` wrote.
        cache_dir: local folder for remote shards; needed for a URL.
        index: the folder's index where it is open already; otherwise it is opened.
        policy: retries and timeout of remote shards.
        cache_gb: most disk space, in 10^9 bytes, that the shards in ``cache_dir`` take; None keeps them all.
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
        cache_gb: float | None = None,
        open_files: int = 256,
    ) -> None:
        self.root, self.policy = str(root), policy or FetchPolicy()
        index = index if index is not None else open_index(root, cache_dir, self.policy)
        self.folder, self._cache = Path(index.root), None
        if is_remote(root):
            self.folder /= SHARDS
            limit = None if cache_gb is None else round(cache_gb * GB)
            self._cache = ShardCache(Path(index.root).parent, self.folder, limit)
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

    def about(self, shard: str, key: str, offset: int, size: int) -> dict[str, Any]:
        """The fields of the ``.json`` of the tile whose image lies at ``offset``; empty if it has none.

        Raises:
            InputError: as ``read``.
        """
        start = offset + size + -size % tarfile.BLOCKSIZE
        blocks = self.read(shard, start, max(min(_MOST_ABOUT, self._expected[shard][0] - start), 0))
        try:
            found = parse_json(find_member(blocks, key, "json") or b"{}")
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def close(self) -> None:
        """Close all descriptors; reading opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        # A reader that failed to open has no files yet. At the interpreter's end, os may be gone before the reader.
        if hasattr(self, "_files") and os is not None:
            self.close()

    def _descriptor(self, shard: str) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        descriptor = self._open(shard)
        self._files[shard] = descriptor
        if len(self._files) > self._open_files:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def _open(self, shard: str) -> int:
        size, digest = self._expected[shard]
        if self._cache is None:
            path = self.folder / shard
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(descriptor).st_size
            if found != size:
                os.close(descriptor)
                raise InputError(
                    f"{path}: {found} bytes, the index says {size}; the shard is truncated or was changed: "
                    "copy it again, or write the folder again with `ca2cl shard`"
                )
            return descriptor
        self._drop_removed()
        url = join(self.root, shard)
        return self._cache.open(
            shard, size, lambda path: fetch(url, path, self.policy, size, f"sha256:{digest}"), self._drop_removed
        )

    def _drop_removed(self) -> None:
        """Close shards that the cache has removed to make room: the disk space is free only then."""
        for name in [name for name, file in self._files.items() if os.fstat(file).st_nlink == 0]:
            os.close(self._files.pop(name))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}
