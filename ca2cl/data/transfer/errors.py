"""Describe download errors of all fsspec clients, without secrets."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ca2cl.common.redact import redact
from ca2cl.errors import InputError

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
"""Our optional dependency for a URL's scheme."""
_QUERY = re.compile(r"(\w://[^\s?'\"()]*)\?[^\s'\"()]*")
_TRY_AGAIN = frozenset({408, 425, 429})
"""Statuses of the client's fault that pass."""


class DiskFull(InputError):
    """There is no room for a file on this machine."""


def shown(text: str) -> str:
    """``text`` in one line, its URLs without user names, passwords and queries."""
    return _QUERY.sub(r"\1", redact(" ".join(text.split())))


def passing(error: Exception, url: str, target: Path) -> str:
    """The reason of a failure, where another attempt may succeed.

    Raises:
        DiskFull, InputError: where none will.
    """
    if any(getattr(one, "errno", None) in (errno.ENOSPC, errno.EDQUOT) for one in _chain(error)):
        raise DiskFull(f"{target.parent}: no room for {target.name}; free some, or use another folder") from None
    silent = "timed out" if isinstance(error, TimeoutError) else type(error).__name__
    reason = shown(str(error))[:300] or silent
    if isinstance(error, ImportError):
        extra = _EXTRAS.get(url.partition("://")[0])
        remedy = f'pip install "ca2cl[{extra}]"' if extra else reason
        raise InputError(f"{shown(url)}: the package for this kind of store is not installed; {remedy}") from None
    status, _ = answer(error)
    # fsspec reports a refused connection as a missing file too, but then without the store's answer.
    if status == 404 or (isinstance(error, FileNotFoundError) and error.__cause__ is None):
        raise InputError(f"{shown(url)}: not found; check the address (of shards: where `ca2cl shard` wrote)") from None
    refused = status is not None and 400 <= status < 500 and status not in _TRY_AGAIN
    if refused or isinstance(error, PermissionError) or type(error).__name__ == "NoCredentialsError":
        raise InputError(f"{shown(url)}: may not be read ({reason}); check address and credentials") from None
    if isinstance(error, ValueError) and "Protocol not known" in str(error):
        raise InputError(f"{shown(url)}: {reason}; use http(s)://, s3://, gs://, hf:// or a folder") from None
    return reason


def retry_after(error: BaseException) -> float:
    """Seconds of the server's Retry-After header; 0 where it has none."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    header = {name.lower(): value for name, value in answer(error)[1].items()}.get("retry-after")
    if header is not None:
        with contextlib.suppress(InvalidHeader):
            return Retry().parse_retry_after(header)
    return 0.0


def answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """HTTP status and headers that an error carries; every client has its own place for them."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):  # botocore
            told = response.get("ResponseMetadata", {})
            return told.get("HTTPStatusCode"), told.get("HTTPHeaders") or {}
        for carrier in (one, response):  # aiohttp's error; requests' and httpx's response
            status = getattr(carrier, "status", None) or getattr(carrier, "status_code", None)
            if isinstance(status, int):
                return status, getattr(carrier, "headers", None) or {}
    return None, {}


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__
