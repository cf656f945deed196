"""The store of a job that names none: a run's own, the user's, or the working directory's."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from ca2cl.cli.parser import parse
from ca2cl.errors import InputError
from ca2cl.store.locate import Place, config_path, place_of_paths, store_flag, user_place

SETS = ("--train", "b", "--test", "c")
RUN_ID = "0123456789abcdef0123456789abcdef"


def make_store(root: Path) -> Path:
    (root / "artifacts").mkdir(parents=True)
    with closing(sqlite3.connect(root / "mlflow.db")) as opened:
        opened.execute("CREATE TABLE runs (run_uuid TEXT)")
        opened.execute("INSERT INTO runs VALUES (?)", (RUN_ID,))
        opened.commit()
    return root


def make_run(folder: Path, uri: str, beside: str = "") -> Path:
    (folder / "encoder").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": RUN_ID, "tracking_uri": uri, "beside": beside}))
    return folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a store and a run in it; the working directory is another one."""
    store = make_store(tmp_path / "project" / "ca2cl-runs")
    make_run(tmp_path / "project" / "runs" / "first", f"sqlite:///{store / 'mlflow.db'}", "../../ca2cl-runs/mlflow.db")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write_config(place: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    path = place / "config.yaml"
    path.write_text(text)
    monkeypatch.setenv("CA2CL_CONFIG", str(path))
    return path


@pytest.mark.parametrize("inside", ["", "encoder", "run.json"])
def test_a_named_runs_store_is_the_jobs(place: Path, inside: str) -> None:
    run = Path("../project/runs/first", inside)
    found = parse("probe", ["--encoder", str(run), *SETS]).tracking
    assert (found.uri, found.root) == (None, str(place / "project" / "ca2cl-runs"))
    assert parse("encoders import", [str(run)]).tracking.root == found.root
    assert parse("embed", [str(place), "out.parquet", "--encoder", str(run)]).tracking.root == found.root


def test_a_store_that_was_moved_with_its_run_is_found_and_one_that_is_gone_is_not(place: Path) -> None:
    (place / "project").rename(place / "moved")
    run = place / "moved" / "runs" / "first"
    assert place_of_paths([str(run)]) == Place(root=str(place / "moved" / "ca2cl-runs"))
    (place / "moved" / "ca2cl-runs" / "mlflow.db").unlink()
    assert place_of_paths([str(run)]) is None
    assert parse("probe", ["--encoder", str(run), *SETS]).tracking.root == "ca2cl-runs"


def test_a_servers_run_leads_to_the_server_and_a_file_beside_a_store_to_the_store(place: Path) -> None:
    run = make_run(place / "served", "http://mlflow:5000")
    assert place_of_paths([str(run)]) == Place(uri="http://mlflow:5000")  # for `ca2cl ui`, which prints it
    tracking = parse("probe", ["--encoder", str(run), *SETS]).tracking
    assert (tracking.uri, tracking.root) == (None, "ca2cl-runs"), "nothing is sent to where a folder says"
    store = place / "project" / "ca2cl-runs"
    (store / "probe-1.json").write_text("{}")
    assert place_of_paths(["champion", "timm:resnet18", str(store / "probe-1.json")]) == Place(root=str(store))


def test_what_is_said_first_wins(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flag, environment, the named run, the user's configuration, the working directory."""
    named, other = ["--encoder", "../project/runs/first", *SETS], ["--encoder", "champion", *SETS]
    assert parse("probe", other).tracking.root == "ca2cl-runs"
    write_config(place, monkeypatch, f"tracking:\n  root: {place / 'mine'}\n")
    assert parse("probe", other).tracking.root == str(place / "mine")
    assert parse("doctor", []).tracking_root == str(place / "mine")
    assert parse("probe", named).tracking.root == str(place / "project" / "ca2cl-runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert parse("probe", named).tracking.root == "ca2cl-runs"  # the URI of the environment decides
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert parse("probe", [*named, "--tracking.root", "ca2cl-runs"]).tracking.root == "ca2cl-runs"
    (place / "recipe.yaml").write_text("tracking: {root: from-recipe}")
    assert parse("probe", ["--config", str(place / "recipe.yaml"), *named]).tracking.root == "from-recipe"


def test_a_run_that_goes_on_and_a_report_keep_their_own_store(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(place, monkeypatch, "tracking:\n  uri: http://mine:1\n")
    run = "../project/runs/first"
    assert parse("pretrain", ["--data.shards", "s", "--run.output_dir", run]).tracking.uri is None
    assert parse("report", [run, "out.html"]).tracking.uri is None
    assert parse("pretrain", ["--data.shards", "s", "--run.output_dir", "new"]).tracking.uri == "http://mine:1"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tracking: {rot: /x}", "unknown setting tracking.rot: did you mean root?"),
        ("traking: {}", "unknown setting traking: did you mean tracking?"),
        ("tracking: {root: here}", "tracking.root is 'here'; give an absolute path"),
        ("tracking: {root: 3}", "tracking.root is 3; give a text"),
        ("- a", "holds no settings"),
        ("tracking: [", "cannot be read"),
    ],
)
def test_a_wrong_configuration_is_one_line(text: str, told: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_config(place, monkeypatch, text)
    with pytest.raises(InputError, match=str(path)) as error:
        user_place()
    assert told in str(error.value)


def test_the_configuration_is_where_xdg_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert config_path() is None  # the tests' own, empty variable
    monkeypatch.delenv("CA2CL_CONFIG")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert config_path() == tmp_path / "ca2cl" / "config.yaml"
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config_path() == tmp_path / ".config" / "ca2cl" / "config.yaml"
    assert user_place() is None


def test_a_command_names_the_store_only_where_it_would_use_another(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place / "project" / "ca2cl-runs"
    assert store_flag(None, store) == ["--tracking.root", str(store)]
    assert store_flag("https://me:secret@mlflow") == ["--tracking.uri", "https://mlflow"]
    assert store_flag(None) == []
    write_config(place, monkeypatch, f"tracking: {{root: {store}}}")
    assert store_flag(None, store) == []
    assert store_flag(None, "ca2cl-runs") == ["--tracking.root", str(place / "elsewhere" / "ca2cl-runs")]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert store_flag(None, store) == []
