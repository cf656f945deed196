"""Redact secrets in URIs before anything is written, sent or printed."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

# user:password@, up to the last @ before the path: an @ inside a password is often not encoded
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")
# A password with a / in it, as the keys of object stores and databases have; digits alone after the colon are a port.
_SLASHED = re.compile(r"(?<=://)[^/?#@\s:]*:(?!\d*[/?#])[^@\s]*@")
_DATABASE = re.compile(r"\b((?:postgres|postgresql|mysql|mariadb|mssql|oracle)(?:\+\w+)?:/{1,2})\S*@", re.I)
# what pathlib makes of a URL; models:/NAME@ALIAS is none
_ONE_SLASH = re.compile(r"\b((?:https?|s3a?|gc?s|ftps?|sftp|ssh|hf|az|abfss?|adl|webdavs?):/)(?!/)[^/?#\s]*@", re.I)
_QUERY = re.compile(
    r"([?&;#][^=&;\s]*(?:token|key|secret|passw|pwd|signature|sig|credential|auth)[^=&;\s]*=)[^&;#\s'\"]+", re.I
)


def redact(text: str) -> str:
    """``text`` without the user names, passwords and tokens that its URIs carry."""
    text = _ONE_SLASH.sub(r"\1", _DATABASE.sub(r"\1", text))
    return _QUERY.sub(r"\1***", _USERINFO.sub("", _SLASHED.sub("", text)))


def redact_all(value: Any) -> Any:
    """``value`` with every text in its lists and mappings redacted, names too; tuples become lists, as in JSON."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {redact_all(name): redact_all(inner) for name, inner in value.items()}
    return [redact_all(inner) for inner in value] if isinstance(value, (list, tuple)) else value


class RedactingFormatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets, whoever wrote them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
