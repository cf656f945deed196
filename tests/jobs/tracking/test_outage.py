"""MLflow away: down at the start, failing, slow, silent or refusing, before a real server.

Nothing is lost, nothing comes twice, nobody waits for long.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ca2cl.config import DataConfig, RunConfig, TrackingConfig
from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, read_card, save_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import open_store
from ca2cl.store.quiet import quiet_mlflow
from ca2cl.tracking import run as run_module
from ca2cl.tracking.journal import Journal, read_journal, training_lines
from ca2cl.tracking.replay import MIRROR_NAME
from ca2cl.tracking.run import RunTracker, open_run
from ca2cl.tracking.run_record import KEY_TAG, read_run
from ca2cl.tracking.sync import sync
from tests.support.forked import Forked
from tests.support.proxies import SECRET, Proxy
from tests.support.servers import Server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server"))
    made.start()
    yield made
    made.stop()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    made = Proxy(int(server.uri.rpartition(":")[2]))
    yield made
    made.stop()


def job(uri: str) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(lanes=8, workers=0), run=RunConfig(batch_size=16, steps=4), tracking=TrackingConfig(uri=uri)
    )


def train(tracker: RunTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log_step({"step": step, "epoch": 0, "samples": step * 16, "loss": 1 / step, "lr": 0.1})


def check_whole(server: Server, folder: Path, status: str = "FINISHED") -> str:
    """MLflow has every number of the journal once, the parameters, the files and the status, in one run; its id."""
    client, record = open_store(server.uri).client, read_run(folder)
    lines = list(training_lines(folder / "journal.jsonl"))
    assert lines
    for name in ("loss", "lr", "samples", "epoch"):
        history = [(point.step, point.value) for point in client.get_metric_history(record.run_id, name)]
        assert sorted(history) == [(line["step"], line[name]) for line in lines], name
    run = client.get_run(record.run_id)
    assert run.info.status == status and run.data.params == record.params
    names = {file.path for file in client.list_artifacts(record.run_id)}
    assert names >= {"config.yaml", "environment.json", "requirements.txt"}
    wanted = f"tags.`{KEY_TAG}` = '{record.tags[KEY_TAG]}'"
    assert [found.info.run_id for found in client.search_runs([run.info.experiment_id], wanted)] == [record.run_id]
    return record.run_id


def sync_at_last(folder: Path, uri: str, tries: int = 60) -> None:
    """As a user would: again, until it says that all is sent."""
    for _ in range(tries):
        try:
            sync(folder, uri)
            return
        except InputError as error:
            assert "\n" not in str(error)
    raise AssertionError("never through")


def test_a_server_that_is_down_at_the_start_gets_the_run_when_it_is_up(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both one that comes up while training goes on, and one that is up long after its end only."""
    quiet_mlflow()  # imports it
    server.stop()
    try:
        before = time.monotonic()
        soon, later = (open_run(tmp_path / name, job(server.uri)) for name in ("soon", "later"))
        assert time.monotonic() - before < 30 and soon.run_id == later.run_id == ""
        assert sum("is away (connection refused): training goes on" in message for message in caplog.messages) == 2
        card = EncoderCard(arch="resnet18", feature_dim=512, input_size=64, mean=(0.5,) * 3, std=(0.2,) * 3)
        for tracker in (soon, later):
            train(tracker, 1, 30)
        later.log_encoder(
            save_encoder(tmp_path / "later" / "encoder", build_encoder("resnet18").state_dict(), card), "late"
        )
        before = time.monotonic()
        assert not later.finish("FINISHED")
        assert time.monotonic() - before < 40 and f"ca2cl sync {tmp_path / 'later'}" in caplog.text
        with pytest.raises(InputError, match="connection refused"):
            sync(tmp_path / "later")
    finally:
        server.start()
    train(soon, 31, 40)
    assert soon.finish("KILLED", timeout=240)
    assert soon.run_id == check_whole(server, tmp_path / "soon", "KILLED")
    assert sync(tmp_path / "later") > 30
    run_id = check_whole(server, tmp_path / "later")
    assert sync(tmp_path / "later") == 0
    assert read_card(tmp_path / "later" / "encoder" / "card.json").source_run_id == run_id
    assert resolve_encoder("models:/late/1", tracking_uri=server.uri).source_run_id == run_id


def test_a_run_that_was_begun_without_its_server_goes_on_with_it(server: Server, tmp_path: Path) -> None:
    away = job("http://127.0.0.1:9")
    tracker = open_run(tmp_path / "run", away)
    train(tracker, 1, 3)
    tracker.finish("KILLED")
    again = open_run(tmp_path / "run", job(server.uri), resume=True, step=2)
    assert again.run_id
    train(again, 3, 5)
    assert again.finish("FINISHED")
    check_whole(server, tmp_path / "run")


@pytest.mark.parametrize("what", ["500", "429", "html", "deaf"])
def test_a_server_that_fails_half_of_the_time_gets_everything_once(
    server: Server, proxy: Proxy, tmp_path: Path, what: str
) -> None:
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    train(tracker, 1, 20)
    draw = random.Random(0)
    proxy.behave = lambda *_: draw.choice(["pass", what])
    train(tracker, 21, 40)
    (tmp_path / "run" / "note.txt").write_text("kept")
    tracker.log_artifact(tmp_path / "run" / "note.txt")
    tracker.finish("FINISHED", timeout=5)
    sync_at_last(tmp_path / "run", proxy.uri)
    run_id = check_whole(server, tmp_path / "run")
    assert "note.txt" in {file.path for file in open_store(server.uri).client.list_artifacts(run_id)}


def test_an_answer_that_is_lost_while_the_run_is_made_leaves_one_run(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.behave = lambda _method, path, _number: "deaf" if path.endswith("runs/create") else "pass"
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    assert tracker.run_id == ""
    train(tracker, 1, 5)
    proxy.always("pass")
    assert tracker.finish("FINISHED", timeout=60)
    check_whole(server, tmp_path / "run")


@pytest.mark.parametrize(("status", "words"), [("401", "wrong or missing credentials"), ("403", "not permitted")])
def test_a_server_that_refuses_is_one_clear_line_at_the_start(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, words: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "me")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    proxy.always(status)
    with pytest.raises(InputError) as caught:
        open_run(tmp_path / "run", job(proxy.uri))
    assert proxy.seen < 5, "what is refused is not tried again and again"
    line = str(caught.value)
    assert words in line and "MLFLOW_TRACKING_PASSWORD" in line and "\n" not in line and SECRET not in line
    assert not (tmp_path / "run").exists()


def test_a_server_that_refuses_a_run_to_resume_leaves_it_as_it_was(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    train(tracker, 1, 3)
    assert tracker.finish("KILLED")
    proxy.always("401")
    with pytest.raises(InputError, match="credentials"):
        open_run(tmp_path / "run", job(proxy.uri), resume=True, step=3)
    with pytest.raises(InputError, match="credentials"):
        sync(tmp_path / "run", proxy.uri)
    check_whole(server, tmp_path / "run", "KILLED")


def test_credentials_that_are_refused_later_do_not_end_the_training(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    proxy.always("401")
    train(tracker, 1, 5)
    assert not tracker.finish("FINISHED")
    proxy.always("pass")
    sync(tmp_path / "run")
    check_whole(server, tmp_path / "run")


def test_a_silent_server_holds_up_neither_start_nor_end(
    server: Server, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run_module, "START_S", 1.0)
    caplog.set_level("INFO")
    proxy.always("hang")
    before = time.monotonic()
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    train(tracker, 1, 5)
    assert not tracker.finish("FINISHED", timeout=5)
    assert time.monotonic() - before < 60  # the server's answer would never come
    assert "has not answered within 1 s" in caplog.text and "to take the rest of this run" in caplog.text
    proxy.always("pass")
    sync(tmp_path / "run", server.uri)
    check_whole(server, tmp_path / "run")


def test_a_process_ends_though_an_upload_hangs(proxy: Proxy, tmp_path: Path) -> None:
    """Nothing that MLflow's client leaves behind is waited for after ``finish``."""
    proxy.behave = lambda method, _path, _number: "hang" if method == "PUT" else "pass"
    code = """
import sys, time
from ca2cl.config import *
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import open_run
tracking = TrackingConfig(uri=sys.argv[2])
config = PretrainConfig(data=DataConfig(lanes=8), run=RunConfig(batch_size=16), tracking=tracking)
tracker = open_run(sys.argv[1], config)
tracker.finish("KILLED", timeout=2)
sys.stdout.write(str(time.time()))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "run"), proxy.uri]
    env = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "600"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    assert time.time() - float(done.stdout) < 120


@pytest.mark.slow
def test_answers_that_take_twenty_seconds_hold_up_nobody_and_lose_nothing(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    """Within the times that README promises; each thing to be sent costs a request or more of 20 s, and then a look."""
    quiet_mlflow()  # imports it
    proxy.delay = 20.0
    before = time.monotonic()
    tracker = open_run(tmp_path / "run", job(proxy.uri))
    assert time.monotonic() - before < run_module.START_S + 5
    before = time.monotonic()
    train(tracker, 1, 50)
    assert time.monotonic() - before < 5
    before = time.monotonic()
    assert not tracker.finish("FINISHED")
    assert time.monotonic() - before < run_module.FINISH_S + 5
    proxy.delay = 0.0
    sync(tmp_path / "run", proxy.uri)
    check_whole(server, tmp_path / "run")


def test_a_sync_that_was_killed_and_two_at_once_send_everything_once(
    server: Server, proxy: Proxy, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    tracker = open_run(folder, job("http://127.0.0.1:9"))
    for step in range(1, 41):
        train(tracker, step, step)
        tracker.set_tag(f"tag{step}", "x")  # an event is a request of its own
    tracker.finish("FINISHED", timeout=1)
    proxy.delay = 0.1
    first = Forked(tmp_path, "sync", str(folder), "--uri", proxy.uri)
    while not (folder / MIRROR_NAME).exists() and first.poll() is None:
        time.sleep(0.02)
    first.kill()
    assert first.wait() == -9
    place = json.loads((folder / MIRROR_NAME).read_text())["offset"]
    left = sum(1 for _ in read_journal(folder / "journal.jsonl", place))
    assert left > 0
    both = [Forked(tmp_path, "sync", str(folder), "--uri", proxy.uri) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(one.splitlines()[0] + "\n" for one in said) == sorted(
        [f"{left} journal lines sent to MLflow\n", "MLflow already has all of this run\n"]
    )
    run_id = check_whole(server, folder)
    assert {f"tag{step}" for step in range(1, 41)} <= set(open_store(server.uri).client.get_run(run_id).data.tags)


def test_a_torn_last_line_is_not_sent_until_it_is_whole(server: Server, tmp_path: Path) -> None:
    tracker = open_run(tmp_path / "run", replace(job(server.uri), run=RunConfig(batch_size=16, steps=5)))
    train(tracker, 1, 4)
    assert tracker.finish("FINISHED")
    path = tmp_path / "run" / "journal.jsonl"
    line = b'{"step": 5, "epoch": 0, "samples": 80, "loss": 0.2, "lr": 0.1, "time": 1700000000.0}\n'
    with path.open("ab") as file:
        file.write(line[:40])
    assert sync(tmp_path / "run") == 0
    check_whole(server, tmp_path / "run")
    with path.open("ab") as file:
        file.write(line[40:])
    assert sync(tmp_path / "run") == 1
    check_whole(server, tmp_path / "run")
    Journal(path).close()
    assert sync(tmp_path / "run") == 0
