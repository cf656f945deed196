"""``ca2cl ui``: the store that it opens, and what it refuses. The pages themselves are a job's test."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.cli.parser import parse
from ca2cl.cli.ui import find_store
from tests.unit.store.test_locate import make_run, make_store


def test_the_store_is_found_in_a_folder_above_and_by_a_runs_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(tmp_path / "project" / "ca2cl-runs")
    run = make_run(tmp_path / "project" / "runs" / "first", f"sqlite:///{store / 'mlflow.db'}")
    monkeypatch.chdir(run)
    assert find_store(parse("ui", [])).root == store
    monkeypatch.chdir(tmp_path)
    assert find_store(parse("ui", [str(run)])).root == store
    assert find_store(parse("ui", ["project/ca2cl-runs"])).root == store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    found = find_store(parse("ui", [str(run)]))
    assert (found.root, found.uri) == (store, f"sqlite:///{store / 'mlflow.db'}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "`ca2cl pretrain` makes one"),
        (("nowhere",), "run 'nowhere': not there"),
        (("/",), "run '/': leads to no store"),
        (("--port", "0"), "port is 0: use 1 or more"),
        (("--tracking.root", "made", "--host", "no.such.host.invalid"), "host is 'no.such.host.invalid'"),
        (("--tracking.root", "made", "--host", "192.0.2.1"), "host is '192.0.2.1'"),
    ],
)
def test_what_cannot_be_opened_is_one_line(
    arguments: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    make_store(tmp_path / "x" / "made")
    monkeypatch.chdir(tmp_path / "x")
    assert main(["ui", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert told in line


def test_a_port_that_is_taken_is_named_with_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "ca2cl-runs")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 2
    assert f"port is {port}: taken on 127.0.0.1; use another, such as --port {port + 1}" in capfd.readouterr().err


def test_a_server_is_its_own_page(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    assert main(["ui"]) == 0
    out = capfd.readouterr().out
    assert "https://mlflow.example" in out and "secret" not in out
