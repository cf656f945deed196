"""MLflow's empty SQLite stores as copies of one: its 68 migrations take two seconds of CPU, a copy a few milliseconds.

Jobs that the tests start by a command line migrate their own.
"""

from __future__ import annotations

import os
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

FOLDER = "CA2CL_TEST_STORES"
"""Variable with the folder that the processes of a test run keep the migrated store in."""


def copy_migrated_stores() -> None:
    """From here on, new stores of this process are copies, if it has imported MLflow's stores."""
    utils: Any = sys.modules.get("mlflow.store.db.utils")
    if utils is None or FOLDER not in os.environ or hasattr(utils._initialize_tables, "migrate"):
        return
    migrate, template = utils._initialize_tables, Path(os.environ[FOLDER], "migrated.db")

    def initialize_tables(engine: Any) -> None:
        if engine.dialect.name != "sqlite" or not utils._is_empty_database(engine):
            migrate(engine)
            return
        if not template.exists():
            _write(template, migrate)
        try:
            with closing(engine.raw_connection()) as new, closing(sqlite3.connect(template)) as migrated:
                migrated.backup(new.driver_connection, progress=_refuse_locked)
        except sqlite3.Error:  # in MLflow's words
            migrate(engine)

    initialize_tables.migrate = migrate  # type: ignore[attr-defined]
    for module in (utils, sys.modules.get("mlflow.store.model_registry.sqlalchemy_store")):
        if module is not None:
            module._initialize_tables = initialize_tables


def _write(template: Path, migrate: Callable[[Any], None]) -> None:
    from sqlalchemy import create_engine

    new = template.with_suffix(f".{os.getpid()}")
    engine = create_engine(f"sqlite:///{new}")
    migrate(engine)
    engine.dispose()
    new.replace(template)


def _refuse_locked(status: int, _remaining: int, _total: int) -> None:
    """Python would wait for a locked database without end."""
    if status in (5, 6):
        raise sqlite3.OperationalError("database is locked")
