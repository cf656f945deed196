"""Where a store is: odd names, moves and copies, artifact stores that cannot be read, temporary folders."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest

from ca2cl.common.scratch import NoScratch, scratch_folder
from ca2cl.errors import InputError
from ca2cl.store.artifacts import fetch, names_in, run_place
from ca2cl.store.databases import database_of
from ca2cl.store.open import open_store, resolve_uri
from ca2cl.store.upload import upload
from ca2cl.tracking.run_record import RunRecord, beside, store_of

NAMES = ["a?b", "x%20y", "x y", "a#b", "é", "a'b", 'a"b', "a&b=c;d", "u:p@h", "100%", "a\\b"]
ODD = "a?b%20c #é ü'\"&=;組+[x]@h"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project folder of an odd name with a store and a run of one file in it; the run's id."""
    folder = tmp_path_factory.mktemp("places") / ODD
    store = open_store(root=folder / "ca2cl-runs")
    run_id = store.client.create_run(store.experiment_id("e")).info.run_id
    (folder / "run").mkdir()
    (folder / "run" / "t.txt").write_text("told", encoding="utf-8")
    upload(store, run_id, folder / "run" / "t.txt", "in")
    return folder, run_id


def told(root: Path, run_id: str) -> str:
    store = open_store(root=root)
    place = run_place(store, run_id, "in")
    assert names_in(store, place) == ["t.txt"]
    with scratch_folder() as scratch:
        return (fetch(store, place, scratch) / "t.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*NAMES, ODD])
def test_a_folder_of_any_name_has_its_own_database(name: str, tmp_path: Path) -> None:
    uri, root = resolve_uri(None, tmp_path / name)
    assert root == tmp_path / name and database_of(uri) == tmp_path / name / "mlflow.db"
    assert resolve_uri(None, tmp_path / "plain")[0] == f"sqlite:///{tmp_path / 'plain' / 'mlflow.db'}"


def test_a_folder_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InputError, match="use another folder"):
        resolve_uri(None, "a\udce9")


def test_a_store_in_an_odd_folder_keeps_files(made: tuple[Path, str]) -> None:
    folder, run_id = made
    assert {entry.name for entry in folder.parent.iterdir()} == {ODD}
    assert (folder / "ca2cl-runs" / "artifacts" / run_id / "artifacts" / "in" / "t.txt").exists()
    assert told(folder / "ca2cl-runs", run_id) == "told"
    uri = resolve_uri(None, folder / "ca2cl-runs")[0]
    assert open_store(uri).root == folder / "ca2cl-runs"  # the same store by its address


def test_a_moved_store_reads_and_writes_beside_itself(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, run_id = made
    old, copy, new = tmp_path / "old", tmp_path / "copy", tmp_path / "new"
    shutil.copytree(folder, copy)  # where both are there, each reads its own
    held = copy / "ca2cl-runs" / "artifacts" / run_id / "artifacts" / "in" / "t.txt"
    held.write_text("copied", encoding="utf-8")
    assert told(copy / "ca2cl-runs", run_id) == "copied" and told(folder / "ca2cl-runs", run_id) == "told"
    folder.rename(old)
    old.rename(new)
    try:
        assert told(new / "ca2cl-runs", run_id) == "told"
        store = open_store(root=new / "ca2cl-runs")
        (new / "u.txt").write_text("later", encoding="utf-8")
        upload(store, run_id, new / "u.txt", "more")
        upload(store, run_id, new / "run", "all")
        assert names_in(store, run_place(store, run_id, "more")) == ["u.txt"]
        assert names_in(store, run_place(store, run_id, "all")) == ["t.txt"]
        assert not folder.exists() and not old.exists()
    finally:
        new.rename(folder)


def test_a_run_finds_the_store_that_was_moved_with_it(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, run_id = made
    store = open_store(root=folder / "ca2cl-runs", check=False)
    record = RunRecord(run_id, store.uri, "e", 1.0, {}, beside=beside(folder / "run", store))
    assert record.beside == "../ca2cl-runs/mlflow.db"
    assert store_of(folder / "run", record).root == folder / "ca2cl-runs"
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert store_of(copy / "run", record).root == copy / "ca2cl-runs"
    gone = RunRecord(run_id, f"sqlite:///{tmp_path}/away/mlflow.db", "e", 1.0, {})
    with pytest.raises(InputError, match="is not there"):
        store_of(copy / "run", gone)
    assert store_of(copy / "run", gone, root=str(copy / "ca2cl-runs")).root == copy / "ca2cl-runs"
    with pytest.raises(InputError, match="is not there"):
        store_of(copy / "run", record, uri=f"sqlite:///{copy}/typo.db")
    assert not (copy / "typo.db").exists() and not (tmp_path / "away").exists()


@pytest.mark.parametrize(
    ("place", "remedy"),
    [
        ("s3://bucket/x", "set AWS_ACCESS_KEY_ID"),
        ("wasbs://c@a.blob.core.windows.net/x", "azure"),
        ("sftp://u@127.0.0.1:1/x", "pysftp"),
        ("nonsense://x", "give back its files"),
    ],
)
def test_an_artifact_store_that_cannot_be_read_is_one_line(
    place: str, remedy: str, made: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    store = open_store(root=made[0] / "ca2cl-runs", check=False)
    for act in (lambda: names_in(store, place), lambda: fetch(store, f"{place}/encoder", tmp_path)):
        with pytest.raises(InputError) as caught:
            act()
        assert "artifact store" in str(caught.value) and remedy.lower() in str(caught.value).lower(), caught.value


def test_a_temporary_folder_that_is_missing_or_full_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fill(path: str) -> None:
        with scratch_folder(), Path(path).open("wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(NoScratch, match=f"{tmp_path}: no space left; free some, or set TMPDIR"):
        fill("/dev/full")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        fill(str(tmp_path / "none" / "x"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(NoScratch, match="set TMPDIR"), scratch_folder():
        raise AssertionError


def test_another_projects_store_in_the_same_place_is_not_taken(made: tuple[Path, str], tmp_path: Path) -> None:
    folder, run_id = made
    store = open_store(root=folder / "ca2cl-runs", check=False)
    record = RunRecord(run_id, store.uri, "e", 1.0, {}, beside="../ca2cl-runs/mlflow.db")
    (tmp_path / "ca2cl-runs").mkdir()
    with sqlite3.connect(tmp_path / "ca2cl-runs" / "mlflow.db") as other:
        other.execute("CREATE TABLE runs (run_uuid TEXT)")
        other.execute("INSERT INTO runs VALUES ('of another project')")
    assert store_of(tmp_path / "run", record).root == folder / "ca2cl-runs"
