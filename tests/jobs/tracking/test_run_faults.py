"""One run's folder and MLflow's copy of it, when another job, the artifact store or a person gets in the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import boto3
import numpy as np
import pytest

from ca2cl.common.job_dir import JobDir
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.pretrain.callbacks import _spread
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.store.open import Store, open_store
from ca2cl.tracking.run import RunTracker, open_run
from ca2cl.tracking.sync import sync
from ca2cl.training.checkpoint import Checkpointer, DamagedCheckpoint
from tests.support.forked import ca2cl
from tests.support.jobs import ROOT
from tests.support.stores import s3_store
from tests.unit.training.test_checkpoints import flip, make_engine

ANOTHER = """
import sys, time
from pathlib import Path
from ca2cl.config import *
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import hold_run, open_run
run, root = sys.argv[1:]
with hold_run(run) as held:
    print("held", flush=True)
    sys.stdin.readline()
    tracker = open_run(run, PretrainConfig(tracking=TrackingConfig(root=root)), resume=True, held=held)
for step in range(1, 4):
    tracker.log_step({"step": step, "loss": 1 / step})
tracker.finish("KILLED")
"""


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(tracking=TrackingConfig(root=str(tmp_path / "store")))


@pytest.fixture
def store(config: PretrainConfig) -> Store:
    return open_store(root=config.tracking.root)


def another(run: Path, config: PretrainConfig) -> subprocess.Popen[str]:
    """A job of another process that has the folder, and works in it when it is told to."""
    command = [sys.executable, "-c", ANOTHER, str(run), config.tracking.root]
    job = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert job.stdout is not None and job.stdout.readline() == "held\n"
    return job


def losses(store: Store, tracker: RunTracker) -> list[int]:
    return sorted(point.step for point in store.client.get_metric_history(tracker.run_id, "loss"))


def test_a_job_that_waited_sees_what_the_one_before_has_written(config: PretrainConfig, tmp_path: Path) -> None:
    job = another(tmp_path / "run", config)
    assert job.stdin is not None
    job.stdin.write("go\n")
    job.stdin.flush()
    with pytest.raises(InputError, match="it already holds a run"):  # looked at before, there was none
        open_run(tmp_path / "run", config)
    assert job.wait() == 0
    tracker = open_run(tmp_path / "run", config, resume=True, step=3)
    tracker.finish("FINISHED")
    lines = [json.loads(line) for line in (tmp_path / "run" / "journal.jsonl").open()]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3]


def test_a_refused_job_leaves_the_lock_of_the_other(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ca2cl.common.job_dir.LOCK_S", 0.3)
    job = another(tmp_path / "run", config)
    real = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: self.name != "run" and real(self))  # a file server's stale view
    for _ in range(2):
        with pytest.raises(InputError, match="another job is writing here"):
            open_run(tmp_path / "run", config)
    job.communicate("go\n")


def test_a_lock_whose_file_was_taken_away_is_none(tmp_path: Path) -> None:
    """Two that wait for one that is refused, and takes the new folder away, do not both get in."""
    wait = (
        "import sys\nfrom pathlib import Path\nfrom ca2cl.common.job_dir import JobDir\n"
        "print('waits', flush=True)\n"
        "with JobDir(Path(sys.argv[1])).locked(30):\n"
        "    print('in', flush=True)\n    sys.stdin.readline()\n"
    )
    folder = tmp_path / "run"
    with JobDir(folder).locked():
        command = [sys.executable, "-c", wait, str(folder)]
        waiting = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None and waiting.stdout.readline() == "waits\n"
        time.sleep(1)
        (folder / ".lock").unlink()
        folder.rmdir()
    assert waiting.stdout.readline() == "in\n"
    with (
        pytest.raises(InputError, match=rf"another job is writing .*\(process {waiting.pid}\)"),
        JobDir(folder).locked(0.0),
    ):
        pass
    waiting.communicate("go\n")


def test_the_store_may_lie_in_the_runs_folder(tmp_path: Path) -> None:
    tracker = open_run(tmp_path / "run", PretrainConfig(tracking=TrackingConfig(root=str(tmp_path / "run"))))
    code = (
        "import sys\nfrom pathlib import Path\nfrom ca2cl.common.job_dir import JobDir\n"
        "with JobDir(Path(sys.argv[1])).locked(0.0): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "another job is writing here" in done.stderr
    tracker.finish("FINISHED")


def test_an_artifact_store_that_is_away_costs_nothing_but_time(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its client has errors of its own, which are not MLflow's."""
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "key", "MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    store = open_store(root=config.tracking.root)
    store.client.create_experiment("far", artifact_location="s3://tiles/mlflow")
    tracking = TrackingConfig(root=config.tracking.root, experiment="far")
    tracker = open_run(tmp_path / "run", PretrainConfig(tracking=tracking))
    tracker.log_step({"step": 1, "loss": 1.0})
    assert not tracker.finish("FINISHED")
    assert "is away (its artifact store: EndpointConnectionError" in caplog.text
    with pytest.raises(InputError, match="its artifact store: EndpointConnectionError"):
        sync(tmp_path / "run")
    with s3_store():  # in a new process: MLflow keeps a client for minutes
        assert ca2cl(tmp_path, "sync", str(tmp_path / "run")).returncode == 0
        held = boto3.client("s3").list_objects_v2(Bucket="tiles", Prefix="mlflow")["Contents"]
    assert {"config.yaml", "environment.json"} <= {entry["Key"].rpartition("/")[2] for entry in held}
    assert losses(store, tracker) == [1] and store.client.get_run(tracker.run_id).info.status == "FINISHED"


def test_a_run_that_is_deleted_and_restored_has_every_step(
    config: PretrainConfig, store: Store, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "run", config)
    store.client.delete_run(tracker.run_id)
    for step in range(1, 6):
        tracker.log_step({"step": step, "loss": 1 / step})
    assert not tracker.finish("FINISHED")
    with pytest.raises(InputError, match="must be in the 'active' state"):
        sync(tmp_path / "run")
    store.client.restore_run(tracker.run_id)
    assert sync(tmp_path / "run") > 0
    assert losses(store, tracker) == [1, 2, 3, 4, 5]


def test_a_link_in_a_runs_folder_sends_no_file_from_outside(
    config: PretrainConfig, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_run(tmp_path / "run", config)
    (tmp_path / "key").write_text("private")
    (tmp_path / "run" / "figs").mkdir()
    (tmp_path / "run" / "figs" / "a.txt").symlink_to(tmp_path / "key")
    tracker.log_artifact(tmp_path / "run" / "figs", "figs")
    assert tracker.finish("FINISHED")
    assert "'figs/a.txt' lies outside the run's folder" in caplog.text
    assert not store.client.list_artifacts(tracker.run_id, "figs")


def test_steps_done_again_on_a_gpu_are_sent_once(config: PretrainConfig, store: Store, tmp_path: Path) -> None:
    """Their losses differ in the last digits; a loss that is another one is sent."""
    tracker = open_run(tmp_path / "run", config)
    for step, loss in enumerate((1.0, 0.5, float("nan"), 0.25, 0.2), 1):
        tracker.log_step({"step": step, "loss": loss})
    tracker.finish("FAILED")
    tracker = open_run(tmp_path / "run", config, resume=True, step=1)
    for step, loss in enumerate((0.5 * (1 + 1e-6), float("nan"), 0.25, 0.3, 0.1), 2):
        tracker.log_step({"step": step, "loss": loss})
    tracker.finish("FINISHED")
    assert losses(store, tracker) == [1, 2, 3, 4, 5, 5, 6]


def test_a_checkpoint_to_begin_from_is_begun_from_once(tmp_path: Path) -> None:
    """A scheduler starts the same command again, which must not throw away what it did since."""
    other, mine = Checkpointer(tmp_path / "other", 2), Checkpointer(tmp_path / "mine", 2)
    other.save(5, make_engine(), {"resume": "auto"})
    path = str(tmp_path / "other" / "step-000000005")
    assert mine.to_resume("never") is None and mine.to_resume("auto") is None
    assert mine.to_resume(path) == Path(path)
    mine.save(9, make_engine(), {"resume": "auto"})
    assert mine.to_resume(path) == Path(path)  # of a job that was not begun from there
    mine.save(7, make_engine(), {"resume": path})
    newest = mine.to_resume(path)
    assert newest is not None and newest.name == "step-000000007" and mine.to_resume("auto") == newest
    flip(newest / "model.safetensors")
    assert mine.to_resume(path) == Path(path)  # nothing whole is left here
    mine.save(7, make_engine(), {"resume": path})
    flip(Path(path) / "model.safetensors")
    assert mine.to_resume(path) == newest
    with pytest.raises(DamagedCheckpoint):
        Checkpointer(tmp_path / "new", 2).to_resume(path)


@pytest.mark.parametrize(("shards", "most", "seen"), [(3, 8, 3), (300, 8, 8), (300, None, 256)])
def test_a_figure_fetches_few_remote_shards(shards: int, most: int | None, seen: int) -> None:
    samples = _spread(np.arange(shards + 1) * 1000, most)
    assert len(set(samples // 1000)) == seen and len(set(samples)) == len(samples) <= 256
