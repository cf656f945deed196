"""Convert SQLite paths to tracking URIs and back."""

from __future__ import annotations

import re
from pathlib import Path

from ca2cl.common.records import is_text
from ca2cl.errors import InputError

_PLAIN = re.compile(r"sqlite:///([A-Za-z0-9._/-]+)")
"""An address that SQLAlchemy, whose import takes a while, need not take apart."""


def sqlite_uri(path: Path) -> str:
    """The tracking URI of a SQLite file.

    Raises:
        InputError: the path cannot be one (it is not UTF-8, or SQLAlchemy is too old to quote it).
    """
    name = str(path)
    uri = f"sqlite:///{name}"
    if "?" in name or "%" in name:
        # with the driver's name, or MLflow makes an empty folder that is called as the quoted one (mlflow/store/db)
        uri = f"sqlite+pysqlite:///{name.replace('%', '%25').replace('?', '%3F')}"
    if not is_text(name) or database_of(uri) != path:
        raise InputError(f"tracking.root is {str(path.parent)!r}: no database's address holds that; use another folder")
    return uri


def database_of(uri: str) -> Path | None:
    """The SQLite file that a tracking URI names; None where it names something else."""
    if not uri.startswith("sqlite"):
        return None
    if plain := _PLAIN.fullmatch(uri):
        return Path(plain[1])
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        name = make_url(uri).database
    except ArgumentError:
        return None
    return Path(name) if name and not name.startswith((":memory:", "file:")) else None
