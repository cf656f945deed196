"""MLflow's mirror: everything arrives once, through outages of a real server; the store is found from anywhere."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ca2cl.errors import InputError
from ca2cl.store.open import Store, fetch_run, open_store, resolve_uri
from ca2cl.tracking.journal import Journal
from ca2cl.tracking.mirror import Mirror
from ca2cl.tracking.replay import MIRROR_NAME, Replayer
from tests.support.servers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds


def new_run(store: Store) -> str:
    return str(store.client.create_run(store.experiment_id("tests")).info.run_id)


def history(store: Store, run_id: str, name: str = "loss") -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in store.client.get_metric_history(run_id, name)]


def steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.append({"step": step, "loss": 1 / step, "lr": 0.1, "samples": step * 8})


def test_numbers_arrive_at_their_step_and_time(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    journal.append({"step": 3, "epoch": 0, "loss": 0.25, "flag": True, "name": "x", "time": 1700000000.5})
    journal.append({"step": 4, "loss": math.nan})
    assert Replayer(tmp_path, embedded, run_id).send() == 2
    first, second = embedded.client.get_metric_history(run_id, "loss")
    assert (first.step, first.value, first.timestamp) == (3, 0.25, 1700000000500)
    assert second.step == 4 and math.isnan(second.value)
    assert set(embedded.client.get_run(run_id).data.metrics) == {"loss", "epoch"}


def test_more_numbers_than_fit_one_request_all_arrive(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 900)  # 2,700 numbers; MLflow takes 1,000 at a time
    assert Replayer(tmp_path, embedded, run_id).send() == 900
    assert history(embedded, run_id) == [(step, 1 / step) for step in range(1, 901)]


def test_it_goes_on_where_it_stopped(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 5)
    assert Replayer(tmp_path, embedded, run_id).send() == 5
    steps(journal, 6, 8)
    assert Replayer(tmp_path, embedded, run_id).send() == 3
    assert Replayer(tmp_path, embedded, run_id).send() == 0
    assert len(history(embedded, run_id)) == 8


@pytest.mark.parametrize("state", [None, "", "[]", '{"offset": 3}', '{"run_id": "other", "offset": 9, "tail": ""}'])
def test_a_lost_or_damaged_place_sends_all_again_without_duplicates(
    embedded: Store, tmp_path: Path, state: str | None
) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 5)
    Replayer(tmp_path, embedded, run_id).send()
    place = tmp_path / MIRROR_NAME
    place.unlink() if state is None else place.write_text(state)
    assert Replayer(tmp_path, embedded, run_id).send() == 5
    assert len(history(embedded, run_id)) == 5


def test_a_rewound_journal_is_sent_right_whatever_its_new_length(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 6)
    Replayer(tmp_path, embedded, run_id).send()
    journal.rewind_to_step(4)
    steps(journal, 5, 30)
    Replayer(tmp_path, embedded, run_id).send()
    assert history(embedded, run_id) == [(step, 1 / step) for step in range(1, 31)]


@pytest.mark.parametrize("in_parts", [False, True])
def test_steps_that_are_done_again_are_sent_once(embedded: Store, tmp_path: Path, in_parts: bool) -> None:
    """Also when the process that MLflow has them from was killed before it could note that."""
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 4)
    Replayer(tmp_path, embedded, run_id).send()
    steps(journal, 5, 9)
    killed, log_batch = Replayer(tmp_path, embedded, run_id), embedded.client.log_batch

    def send_and_die(*arguments: Any, **more: Any) -> None:
        log_batch(*arguments, **more)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(embedded.client, "log_batch", send_and_die)
        killed.send()
    assert len(history(embedded, run_id)) == 9
    journal.rewind_to_step(3)
    if in_parts:
        Replayer(tmp_path, embedded, run_id).send()
    time.sleep(0.01)  # the time of a point is in milliseconds
    steps(journal, 4, 12)
    Replayer(tmp_path, embedded, run_id).send()
    assert history(embedded, run_id) == [(step, 1 / step) for step in range(1, 13)]


def test_watches_that_are_done_again_are_sent_once(embedded: Store, tmp_path: Path) -> None:
    """Also those of steps without a training line, as under ``run.log_every``."""
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)

    def watch(first: int, last: int) -> None:
        for step in range(first, last + 1):
            if step % 4 == 0:
                steps(journal, step, step)
            numbers = {"watch/rank": 1 / step, "watch/knn": step / 10}
            journal.append({"event": "watch", "in_step": step, **numbers, "collapse": "flat"})

    watch(1, 7)
    Replayer(tmp_path, embedded, run_id).send()
    journal.rewind_to_step(2)
    time.sleep(0.01)  # the time of a point is in milliseconds
    watch(3, 9)
    Replayer(tmp_path, embedded, run_id).send()
    for name in ("watch/rank", "watch/knn"):
        found = embedded.client.get_metric_history(run_id, name)
        assert [point.step for point in found] == list(range(1, 10)), name
    assert [step for step, _ in history(embedded, run_id)] == [4, 8]
    assert "watch/collapse" not in embedded.client.get_run(run_id).data.metrics


def test_steps_that_are_done_again_with_other_numbers_are_sent(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 4)
    Replayer(tmp_path, embedded, run_id).send()
    journal.rewind_to_step(2)
    journal.append({"step": 3, "epoch": 0, "samples": 48, "loss": 7.0, "lr": 0.1})
    Replayer(tmp_path, embedded, run_id).send()
    assert sorted(history(embedded, run_id)) == [(1, 1.0), (2, 0.5), (3, 1 / 3), (3, 7.0), (4, 0.25)]


def test_artifacts_tags_params_and_status_arrive(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "a.png").write_bytes(b"png")
    journal.append(
        {"event": "params", "params": {f"p{number}": number for number in range(150)} | {"long": "x" * 9000}}
    )
    journal.append({"event": "tags", "tags": {"a.tag": "value"}})
    journal.append({"event": "artifact", "path": "figures/a.png", "to": "figures"})
    journal.append({"event": "artifact", "path": "gone.png", "to": ""})
    journal.append({"event": "status", "status": "KILLED", "time": 1700000000.0})
    assert Replayer(tmp_path, embedded, run_id).send() == 5
    run = embedded.client.get_run(run_id)
    assert len(run.data.params) == 151 and run.data.tags["a.tag"] == "value"
    assert (run.info.status, run.info.end_time) == ("KILLED", 1700000000000)
    assert [file.path for file in embedded.client.list_artifacts(run_id, "figures")] == ["figures/a.png"]


def test_a_line_that_mlflow_refuses_or_that_is_damaged_does_not_block_the_rest(
    embedded: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    journal.append({"event": "params", "params": {"a": 1}})
    journal.append({"event": "params", "params": {"a": 2}})
    journal.append({"event": "artifact"})
    steps(journal, 1, 2)
    Replayer(tmp_path, embedded, run_id).send()
    assert len(history(embedded, run_id)) == 2
    assert sum("refuses" in message for message in caplog.messages) == 2


def test_the_thread_follows_the_journal_and_drains_when_closed(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    mirror = Mirror(Replayer(tmp_path, embedded, run_id), interval=0.05).start()
    steps(journal, 1, 5)
    deadline = time.monotonic() + 60
    while len(history(embedded, run_id)) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    steps(journal, 6, 500)
    assert mirror.close(30)
    assert len(history(embedded, run_id)) == 500


def test_an_outage_of_the_server_costs_one_warning_and_no_number(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(server.uri)
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(store)
    mirror = Mirror(Replayer(tmp_path, store, run_id), interval=0.05, longest_pause=0.2).start()
    steps(journal, 1, 20)
    server.stop()

    def away() -> int:
        return sum("is away" in message for message in caplog.messages)

    slowest, last = 0.0, 20
    while last < 59 or not away():
        before, last = time.perf_counter(), last + 1
        steps(journal, last, last)
        slowest = max(slowest, time.perf_counter() - before)
        time.sleep(0.02)
    assert away() == 1
    server.start()
    steps(journal, last + 1, last + 11)
    (tmp_path / "note.txt").write_text("kept")
    journal.append({"event": "artifact", "path": "note.txt", "to": "sub"})
    assert mirror.close(60)
    assert history(store, run_id) == [(step, 1 / step) for step in range(1, last + 12)]
    assert [file.path for file in store.client.list_artifacts(run_id, "sub")] == ["sub/note.txt"]
    assert slowest < 5  # the writer never waits for MLflow, which starts in more


def test_closing_while_the_store_is_away_ends_in_time_and_says_that_something_is_left(tmp_path: Path) -> None:
    store = open_store("http://127.0.0.1:9", check=False)
    mirror = Mirror(Replayer(tmp_path, store, "a" * 32), interval=0.05).start()
    steps(Journal(tmp_path / "journal.jsonl"), 1, 3)
    before = time.monotonic()
    assert not mirror.close(60)
    assert time.monotonic() - before < 60


def test_the_embedded_store_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    run_id = new_run(open_store(root="runs"))
    (tmp_path / "file.txt").write_text("x")
    monkeypatch.chdir(tmp_path / "elsewhere")
    store = open_store(root=tmp_path / "runs")
    store.client.log_artifact(run_id, str(tmp_path / "file.txt"))
    run = fetch_run(store, run_id)
    assert run.info.artifact_uri.startswith((tmp_path / "runs" / "artifacts").as_uri())
    assert not any((tmp_path / "elsewhere").iterdir())
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [".store.lock", "artifacts", "mlflow.db"]


def test_an_explicit_uri_wins_over_the_environment_and_that_over_the_embedded_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded = f"sqlite:///{tmp_path / 'a' / 'mlflow.db'}"
    assert resolve_uri(None, tmp_path / "a") == (embedded, tmp_path / "a")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://environment:1")
    assert resolve_uri(None, tmp_path / "a") == ("http://environment:1", None)
    assert resolve_uri("http://explicit:1", tmp_path / "a") == ("http://explicit:1", None)


def test_processes_that_make_the_embedded_store_at_once_share_it(tmp_path: Path) -> None:
    code = (
        "import sys; from ca2cl.store.open import open_store; "
        "sys.stdout.write(open_store(root=sys.argv[1]).experiment_id('shared'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "runs")]

    def start(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=True)

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(start, range(2)))
    assert len({process.stdout for process in done}) == 1
    assert "alembic" not in done[0].stderr


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://x", "sqlite:////proc/none/x.db"])
def test_a_store_that_cannot_be_used_is_one_clear_line(uri: str) -> None:
    with pytest.raises(InputError) as caught:
        open_store(uri)
    assert uri in str(caught.value) and "\n" not in str(caught.value) and "--tracking.uri" in str(caught.value)


def test_secrets_of_an_unreachable_store_are_not_shown() -> None:
    with pytest.raises(InputError) as caught:
        open_store("http://user:hunter2@127.0.0.1:9/x?token=hunter2")
    assert "hunter2" not in str(caught.value)


def test_an_unknown_run_id_is_one_clear_line(embedded: Store) -> None:
    with pytest.raises(InputError, match="a{32}.*check the id"):
        fetch_run(embedded, "a" * 32)


def test_the_place_is_written_as_json(embedded: Store, tmp_path: Path) -> None:
    journal, run_id = Journal(tmp_path / "journal.jsonl"), new_run(embedded)
    steps(journal, 1, 2)
    Replayer(tmp_path, embedded, run_id).send()
    state = json.loads((tmp_path / MIRROR_NAME).read_text())
    assert state["offset"] == journal.path.stat().st_size and state["run_id"] == run_id
