"""A new embedded store is a copy of an empty one, and the same as MLflow makes."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from mlflow.store.db import utils
from sqlalchemy import create_engine

from ca2cl.store.open import open_store
from ca2cl.store.template import start_database


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ca2cl"


def content(database: Path) -> dict[str, Any]:
    """Tables and indexes with their definitions, and the rows of every table."""
    with closing(sqlite3.connect(database)) as opened:
        schema = opened.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY name").fetchall()
        names = [name for kind, name, *_ in schema if kind == "table"]
        # a migration that makes a table anew lists its constraints in any order
        parts = [(*place, sorted(line.strip(" \t,") for line in (sql or "").splitlines())) for *place, sql in schema]
        return {"schema": parts, **{name: opened.execute(f'SELECT * FROM "{name}"').fetchall() for name in names}}


def test_copies_are_what_mlflow_makes(tmp_path: Path, cache: Path) -> None:
    migrate: Any = utils._initialize_tables
    engine = create_engine(f"sqlite:///{tmp_path / 'migrated.db'}")
    getattr(migrate, "migrate", migrate)(engine)  # MLflow's own, which the tests replace by copies
    engine.dispose()
    wanted = content(tmp_path / "migrated.db")
    assert len(wanted["alembic_version"]) == 1 and "runs" in wanted
    for name in ("first.db", "second.db"):
        start_database(tmp_path / name)
        assert content(tmp_path / name) == wanted
    assert len(list(cache.iterdir())) == 1


def test_a_store_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "there.db").write_bytes(b"mine")
    start_database(tmp_path / "there.db")
    assert (tmp_path / "there.db").read_bytes() == b"mine"


def test_every_store_has_its_own_folder(tmp_path: Path) -> None:
    for name in ("one", "two"):
        store = open_store(root=tmp_path / name)
        run = store.client.create_run(store.experiment_id("e"))
        assert run.info.artifact_uri.startswith((tmp_path / name / "artifacts").as_uri())
        assert [one.name for one in store.client.search_experiments()] == ["e", "Default"]


@pytest.mark.parametrize("damage", [b"", b"no database", None])
def test_a_damaged_template_is_made_again(damage: bytes | None, tmp_path: Path, cache: Path) -> None:
    start_database(tmp_path / "first.db")
    (template,) = cache.iterdir()
    template.write_bytes(template.read_bytes()[:20_000] if damage is None else damage)
    start_database(tmp_path / "second.db")
    assert content(tmp_path / "second.db") == content(tmp_path / "first.db") == content(template)


def test_without_a_cache_mlflow_makes_the_store(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file")
    start_database(tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()
    assert open_store(root=tmp_path / "store").client.search_experiments()


def test_where_mlflow_has_changed_it_makes_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(utils, "_initialize_tables")
    start_database(tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


def test_a_store_that_will_take_a_run_is_known_by_its_file(tmp_path: Path) -> None:
    store = open_store(root=tmp_path / "runs")
    store.client.delete_experiment(store.experiment_id("gone"))
    assert store.surely_takes("new") and store.surely_takes("Default") and not store.surely_takes("gone")
    with closing(sqlite3.connect(tmp_path / "runs" / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = 'of another MLflow'")
        database.commit()
    assert not store.surely_takes("new")
    assert not open_store("http://127.0.0.1:9", check=False).surely_takes("new")
