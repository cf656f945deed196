"""The store that a path or a user's configuration leads to."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ca2cl.common.mlflow_names import check_tracking_uri
from ca2cl.common.records import read_record
from ca2cl.common.redact import redact
from ca2cl.errors import InputError, nearest
from ca2cl.store.databases import database_of, sqlite_uri
from ca2cl.store.open import ARTIFACTS, DATABASE, DEFAULT_ROOT, resolve_uri

RUN_RECORD = "run.json"
CONFIG_VARIABLE = "CA2CL_CONFIG"
"""Variable with the path of the user's configuration; empty for none."""
_ABOVE = 3
"""Folders above a path that are looked at: RUN/checkpoints/STEP/encoder is in a run's folder."""


class Place(NamedTuple):
    """A store as ``tracking.uri`` and ``tracking.root`` name it; only one of them is set."""

    uri: str | None = None
    root: str | None = None


def place_of_paths(named: Iterable[str]) -> Place | None:
    """The store of the first path that leads to one: a run's folder, something in it, or a file beside a store.

    A store that is gone, or that this user cannot write, is none.
    """
    return next((place for name in named if (place := _place_of_path(name)) is not None), None)


def user_place() -> Place | None:
    """The store in the user's configuration, if there is one.

    Raises:
        InputError: the file holds something else than ``tracking.uri`` or ``tracking.root``.
    """
    path = config_path()
    if path is None or not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); give a file of YAML") from None
    tracking = _only(path, content, ("tracking",)).get("tracking") or {}
    place = Place(**_only(path, tracking, Place._fields, "tracking."))
    for name, value in place._asdict().items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}: tracking.{name} is {value!r}; give a text")
    if place.uri is not None:
        check_tracking_uri("tracking.uri", place.uri)
        return Place(uri=place.uri)
    if place.root is None:
        return None
    root = Path(place.root).expanduser()
    if not root.is_absolute():
        raise InputError(f"{path}: tracking.root is {place.root!r}; give an absolute path, or one that begins with ~")
    return Place(root=str(root))


def store_flag(uri: str | None, root: str | Path = DEFAULT_ROOT) -> list[str]:
    """Words by which a command that is started here uses this store; none where it does so by itself."""
    chosen, folder = resolve_uri(uri, root)
    own = None if os.environ.get("MLFLOW_TRACKING_URI") else user_place()
    if (chosen, folder) == resolve_uri(*((own.uri, own.root or DEFAULT_ROOT) if own else (None, DEFAULT_ROOT))):
        return []
    return ["--tracking.root", str(folder)] if folder is not None else ["--tracking.uri", redact(chosen)]


def config_path() -> Path | None:
    """Path of the user's configuration, whether or not there is a file; None where there is to be none."""
    if (named := os.environ.get(CONFIG_VARIABLE)) is not None:
        return Path(named).expanduser() if named else None
    base = os.environ.get("XDG_CONFIG_HOME", "")
    with suppress(RuntimeError):  # a user without a home
        return (Path(base) if base.startswith("/") else Path.home() / ".config") / "ca2cl" / "config.yaml"
    return None


def _only(path: Path, content: Any, known: Iterable[str], group: str = "") -> dict[str, Any]:
    if not isinstance(content, dict):
        raise InputError(f"{path}: {group.rstrip('.') or 'the file'} holds no settings; give tracking.root or .uri")
    for name in content:
        if name not in known:
            raise InputError(f"{path}: unknown setting {group}{name}: {nearest(str(name), list(known))}")
    return content


def _place_of_path(named: str) -> Place | None:
    if "://" in named:
        return None
    try:
        path = Path(named).expanduser().resolve()
        if not path.exists():
            return None
    except (OSError, RuntimeError, ValueError):  # too long for a path, no such user, a null
        return None
    for folder in (path, *path.parents)[: _ABOVE + 1]:
        if (folder / RUN_RECORD).is_file():
            return _place_of_run(folder)
        if (folder / DATABASE).is_file() and (folder / ARTIFACTS).is_dir():
            return Place(root=str(folder)) if _is_ours(folder / DATABASE) else None
    return None


def _place_of_run(folder: Path) -> Place | None:
    try:
        record: Mapping[str, Any] = read_record(folder / RUN_RECORD, dict[str, Any], "")
    except InputError:  # a job that needs it says so
        return None
    uri, beside, run_id = (str(record.get(name) or "") for name in ("tracking_uri", "beside", "run_id"))
    database = database_of(found := find_made_in(folder, uri, beside, run_id))
    if database is None:
        return Place(uri=found) if found else None
    if not _is_ours(database):
        return None
    embedded = database.name == DATABASE and (database.parent / ARTIFACTS).is_dir()
    return Place(root=str(database.parent)) if embedded else Place(uri=found)


def _is_ours(database: Path) -> bool:
    return database.is_file() and os.access(database, os.W_OK) and os.access(database.parent, os.W_OK)


def find_made_in(folder: Path, tracking_uri: str, beside: str, run_id: str, root: str = "") -> str:
    """The tracking URI of the store that a run was made in, wherever that is now.

    Args:
        folder: of the run.
        tracking_uri, beside, run_id: from its ``run.json``.
        root: of the embedded store that is meant where that one is gone.
    """
    recorded = database_of(tracking_uri)
    if recorded is None:
        return tracking_uri
    here = [(folder / beside).resolve()] if beside else []
    here += [recorded, *([Path(root).expanduser().resolve() / recorded.name] if root else [])]
    database = next((one for one in here if _holds(one, run_id)), recorded)
    return tracking_uri if database == recorded else sqlite_uri(database)


def _holds(database: Path, run_id: str) -> bool:
    """True if a store has the run: another project's store may lie in the same place."""
    try:
        with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True)) as opened:
            found = opened.execute("SELECT 1 FROM runs WHERE run_uuid = ? OR ? = ''", (run_id, run_id)).fetchone()
    except sqlite3.Error:
        return False
    return found is not None
