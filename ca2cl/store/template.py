"""Start a new embedded store from a copy of an empty one.

MLflow makes a database by its first tables and some 70 migrations, which take longer than all else before the first
step of a short job. So the first empty database of each MLflow version is kept in the user's cache.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
import tempfile
from contextlib import AbstractContextManager, closing
from importlib import metadata
from pathlib import Path
from typing import Any

from ca2cl.common.files import replacing
from ca2cl.store.quiet import quiet_mlflow

logger = logging.getLogger(__name__)


def start_database(path: Path) -> None:
    """Write the empty SQLite database ``path`` as MLflow would, if it is not there. One process may do so at a time.

    Where the cache cannot be used, or MLflow's functions have changed, the file is left to MLflow, which makes it then.
    """
    if path.exists():
        return
    try:
        template = _template()
        with template.open("rb") as kept, replacing(path) as file:
            shutil.copyfileobj(kept, file)
    except Exception as error:  # noqa: BLE001 - whatever is wrong here, MLflow can do without it
        logger.debug("%s is left to MLflow: %r", path, error)


def _template() -> Path:
    """The empty database of this MLflow, made where it is not there or damaged."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ca2cl"
    template = cache / f"mlflow-{metadata.version('mlflow')}.db"
    if not _is_whole(template):
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch, template.name)
            _migrate(made)
            with made.open("rb") as source, replacing(template) as file:
                shutil.copyfileobj(source, file)
    return template


def _is_whole(template: Path) -> bool:
    if not template.is_file() or template.stat().st_uid != os.getuid():
        return False
    try:
        with _opened(template, "ro") as database:
            (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
            runs = database.execute("SELECT count(*) FROM runs").fetchone()
            return sound == "ok" and runs == (0,) and len(_heads(database)) == 1
    except sqlite3.Error:
        return False


def lacks_nothing(path: Path, experiment: str) -> bool:
    """True if a database has this MLflow's version, can be written now, and ``experiment`` was not deleted in it."""
    try:
        with _opened(_template(), "ro") as template, _opened(path, "rw") as database:
            database.execute("BEGIN IMMEDIATE").close()
            database.rollback()
            gone = "SELECT 1 FROM experiments WHERE name = ? AND lifecycle_stage <> 'active'"
            return _heads(template) == _heads(database) and database.execute(gone, (experiment,)).fetchone() is None
    except Exception as error:  # noqa: BLE001 - whatever is wrong here, MLflow will say
        logger.debug("%s is left to MLflow: %r", path, error)
        return False


def _opened(path: Path, mode: str) -> AbstractContextManager[sqlite3.Connection]:
    return closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode={mode}", uri=True))


def _heads(database: sqlite3.Connection) -> list[Any]:
    """The version of the tables, in Alembic's words."""
    return database.execute("SELECT version_num FROM alembic_version").fetchall()


def _migrate(path: Path) -> None:
    """Make the database as MLflow's own store does on its first start."""
    quiet_mlflow()
    from mlflow.store.db import utils
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{path}")
    try:
        utils._initialize_tables(engine)
    finally:
        engine.dispose()
