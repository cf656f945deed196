"""A run's life: created, resumed as the same run, ended with its status; its folder tells everything."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ca2cl.config import DataConfig, OptimConfig, RunConfig, TrackingConfig
from ca2cl.errors import InputError
from ca2cl.methods.ca2cl.cluster_figure import cluster_figure
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.store.open import Store, open_store
from ca2cl.tracking.figures import curves_figure
from ca2cl.tracking.journal import Journal, training_lines
from ca2cl.tracking.run import NullTracker, RunTracker, open_run
from ca2cl.tracking.run_record import read_run
from ca2cl.tracking.sync import SyncConfig, sync
from ca2cl.tracking.sync import run as run_sync
from tests.support.forked import CODE, Forked

MANIFEST = {"schema_version": 1, "classes": ["A"], "digest": "d" * 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tracking-tests"  # shared: making one takes seconds


@pytest.fixture
def config(root: Path) -> PretrainConfig:
    return PretrainConfig(
        data=DataConfig(lanes=8, workers=0),
        run=RunConfig(batch_size=16, steps=4),
        tracking=TrackingConfig(root=str(root), run_name="the-run"),
    )


@pytest.fixture
def store(root: Path) -> Store:
    return open_store(root=root)


def train(tracker: RunTracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        tracker.log_step({"step": step, "epoch": 0, "samples": step * 16, "loss": 1 / step, "lr": 0.1})


@pytest.mark.parametrize("later", [False, True])
def test_a_run_from_start_to_end(config: PretrainConfig, store: Store, tmp_path: Path, later: bool) -> None:
    tracker = open_run(tmp_path / "run", config, manifest=MANIFEST, later=later)
    assert read_run(tmp_path / "run").run_id == tracker.run_id and bool(tracker.run_id) != later
    train(tracker, 1, 4)
    tracker.set_tag("a.tag", "b")
    tracker.log_figure("curves", curves_figure(tracker.journal.path))
    assert tracker.finish("FINISHED")
    run = store.client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "the-run")
    assert run.data.params["run.batch_size"] == "16" and run.data.metrics["loss"] == 0.25
    assert run.data.metrics["system/system_memory_usage_megabytes"] > 0
    assert run.data.tags["a.tag"] == "b" and run.data.tags["ca2cl.manifest_digest"] == MANIFEST["digest"]
    names = {file.path for file in store.client.list_artifacts(tracker.run_id)}
    assert names == {"config.yaml", "manifest.json", "environment.json", "requirements.txt", "figures"}
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["run"]["steps"] == 4 and written["views"]["crop_scale"] == list(config.views.crop_scale)
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert "torch==" in (tmp_path / "run" / "requirements.txt").read_text()


def test_a_run_that_waits_for_its_first_step_is_there_in_the_end(
    config: PretrainConfig, store: Store, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "stopped", config, later=True)
    assert tracker.finish("FAILED")
    assert store.client.get_run(tracker.run_id).info.status == "FAILED"
    tracker = open_run(tmp_path / "run", config, later=True)
    train(tracker, 1, 1)
    tracker.await_run()
    assert tracker.run_id == read_run(tmp_path / "run").run_id != ""
    tracker.finish("FINISHED")


def test_a_run_does_not_wait_where_the_store_will_refuse_it(
    config: PretrainConfig, store: Store, tmp_path: Path
) -> None:
    store.client.delete_experiment(store.experiment_id("gone"))
    gone = replace(config, tracking=replace(config.tracking, experiment="gone"))
    with pytest.raises(InputError, match="it was deleted"):
        open_run(tmp_path / "run", gone, later=True)
    assert not (tmp_path / "run").exists()


WITHOUT_MLFLOW = """
import os, sys
from ca2cl.config import TrackingConfig
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import open_run
open_run("run", PretrainConfig(tracking=TrackingConfig(root=sys.argv[1])), later=True)
os._exit(len({"mlflow", "sqlalchemy"} & set(sys.modules)))
"""


def test_before_the_first_step_mlflow_is_not_imported(store: Store, root: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_MLFLOW, str(root)], cwd=tmp_path, check=True)


def test_a_resumed_run_is_the_same_run_and_tells_what_changed(
    config: PretrainConfig, store: Store, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "run", config)
    train(tracker, 1, 4)
    tracker.finish("KILLED")
    assert store.client.get_run(tracker.run_id).info.status == "KILLED"
    changed = replace(config, optim=OptimConfig(lr=1e-3))
    again = open_run(tmp_path / "run", changed, resume=True, step=3)
    train(again, 4, 6)
    assert again.finish("FINISHED")
    run = store.client.get_run(tracker.run_id)
    assert again.run_id == tracker.run_id and run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.0006"
    assert run.data.tags["param_drift.optim.lr"] == "0.0006 -> 0.001"
    assert [name for name in run.data.tags if name.startswith("param_drift.")] == ["param_drift.optim.lr"]
    assert [line["step"] for line in training_lines(tmp_path / "run" / "journal.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert run.data.metrics["loss"] == 1 / 6


def test_a_used_folder_is_refused_unless_the_run_is_resumed(config: PretrainConfig, tmp_path: Path) -> None:
    open_run(tmp_path / "run", config).finish("FINISHED")
    with pytest.raises(InputError, match="--run.resume auto"):
        open_run(tmp_path / "run", config)


def test_an_unwritable_folder_is_one_clear_line(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="run.output_dir"):
        open_run(tmp_path / "file" / "run", config)


def test_a_new_run_needs_an_embedded_store_that_works(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    broken = replace(config, tracking=TrackingConfig(root=str(tmp_path / "file")))
    with pytest.raises(InputError, match="tracking.root"):
        open_run(tmp_path / "run", broken)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_needs_no_store(
    config: PretrainConfig, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = replace(config, tracking=TrackingConfig(uri="http://127.0.0.1:9"))
    tracker = open_run(tmp_path / "run", config)
    train(tracker, 1, 2)
    tracker.finish("KILLED")
    resumed = open_run(tmp_path / "run", away, resume=True, step=2)
    train(resumed, 3, 4)
    assert not resumed.finish("FINISHED", timeout=5)
    assert "ca2cl sync" in caplog.text
    assert run_sync(SyncConfig(run_dir=str(tmp_path / "run"))) == 0  # to where the run was made
    run = store.client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED" and run.data.metrics["loss"] == 0.25
    assert sync(tmp_path / "run") == 0


def test_a_resumed_run_that_the_store_does_not_know_is_one_clear_line(config: PretrainConfig, tmp_path: Path) -> None:
    tracker = open_run(tmp_path / "run", config)
    tracker.finish("KILLED")
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace(tracker.run_id, "0" * 32))
    with pytest.raises(InputError, match="check the id"):
        open_run(tmp_path / "run", config, resume=True)


def test_an_encoder_is_registered_by_the_mirror_and_resolved_by_run_id(
    config: PretrainConfig, store: Store, tmp_path: Path
) -> None:
    tracker = open_run(tmp_path / "run", config)
    state = build_encoder("resnet18").state_dict()
    card = EncoderCard(
        arch="resnet18", feature_dim=512, input_size=64, mean=(0.5,) * 3, std=(0.2,) * 3, source_run_id=tracker.run_id
    )
    tracker.log_encoder(save_encoder(tmp_path / "run" / "encoder", state, card), "from-a-run")
    assert tracker.finish("FINISHED")
    for source in (tracker.run_id, "models:/from-a-run@latest", str(tmp_path / "run")):
        found = resolve_encoder(source, tracking_uri=store.uri)
        assert found.source_run_id == tracker.run_id
        assert torch.equal(found.encoder.conv1.weight, state["conv1.weight"])


def test_a_killed_process_loses_no_line(config: PretrainConfig, store: Store, tmp_path: Path) -> None:
    code = """
import os, sys
from ca2cl.config import *
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import open_run
tracking = TrackingConfig(root=sys.argv[2])
config = PretrainConfig(data=DataConfig(lanes=8), run=RunConfig(batch_size=16), tracking=tracking)
tracker = open_run(sys.argv[1], config)
for step in range(1, 501):
    tracker.log_step({"step": step, "loss": 1 / step})
os.kill(os.getpid(), 9)
"""
    killed = Forked(tmp_path, code, str(tmp_path / "run"), str(store.root), module=CODE)
    assert killed.wait(timeout=300) == -9
    assert sync(tmp_path / "run") > 0
    record = read_run(tmp_path / "run")
    history = store.client.get_metric_history(record.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(step, 1 / step) for step in range(1, 501)]


def test_a_folder_that_another_job_works_in_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    tracker = open_run(tmp_path / "run", config)
    script = (
        "import logging, sys\nfrom ca2cl.pretrain.config import PretrainConfig\n"
        "from ca2cl.config import TrackingConfig\nfrom ca2cl.common import job_dir\nfrom ca2cl.tracking import run\n"
        "logging.basicConfig(level='INFO')\njob_dir.LOCK_S = float(sys.argv[3])\n"
        "run.open_run(sys.argv[1], PretrainConfig(tracking=TrackingConfig(root=sys.argv[2])), resume=True)\n"
    )
    arguments = (script, str(tmp_path / "run"), str(config.tracking.root))
    refused = Forked(tmp_path, *arguments, "0", module=CODE)
    assert refused.wait(timeout=300) == 1
    assert "another job is writing here; wait for it, or end it" in refused.stderr().splitlines()[-1]
    waits = Forked(tmp_path, *arguments, "300", module=CODE)
    while "another job is writing here; waiting for it" not in waits.stderr():
        assert waits.poll() is None, waits.stderr()
        time.sleep(0.02)
    tracker.finish("FINISHED")
    assert waits.wait(timeout=300) == 0, waits.stderr()


def test_no_secret_is_written_anywhere(config: PretrainConfig, tmp_path: Path) -> None:
    secret = replace(config, data=DataConfig(lanes=8, shards="https://me:hunter2@host/x?token=hunter2"))
    open_run(tmp_path / "run", secret).finish("FINISHED")
    for path in (tmp_path / "run").rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes(), path


def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run here"):
        sync(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        sync(tmp_path)


def test_the_other_ranks_tracker_takes_everything_and_writes_nothing() -> None:
    tracker = NullTracker()
    tracker.log_step({"step": 1})
    tracker.log_event("x", a=1)
    tracker.set_tag("a", "b")
    assert tracker.finish("FINISHED") and tracker.run_id == ""


def test_a_step_costs_one_write_and_waits_for_no_disk_and_no_store(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in the training thread alone; ``benchmarks.outage`` has the times."""
    tracker = open_run(tmp_path / "run", config)
    synced: list[str] = []
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda _file: synced.append(threading.current_thread().name))
    before = system_calls()
    train(tracker, 1, 1000)
    after, by = system_calls(), set(synced)
    tracker.finish("FINISHED")
    assert after["syscw"] - before["syscw"] == 1000 and threading.current_thread().name not in by
    assert after["syscr"] - before["syscr"] <= 5  # these looks themselves


def system_calls() -> dict[str, int]:
    """The kernel's counts of this thread's reads and writes."""
    lines = Path("/proc/thread-self/io").read_text().splitlines()
    return {name: int(count) for name, _, count in (line.partition(": ") for line in lines)}


def test_the_curves_show_every_number_of_the_journal_and_bridge_no_gap(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 5001):
        loss = math.nan if 2000 < step <= 2100 else 1 / step
        journal.append({"step": step, "loss": loss, "nt_xent": 1 / step, "lr": 0.1, "tiles_per_s": 50.0})
    figure = curves_figure(journal.path, CA2CL.curves, {"nt_xent": 4.84})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Loss", "NT-Xent", "Learning rate", "Throughput"]
    legends = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in figure.axes[:2]]
    assert legends == [["running mean"], ["running mean", "chance 4.84"]]
    total = figure.axes[0].get_lines()[0]
    assert len(total.get_xdata()) <= 2000 and np.isnan(total.get_ydata()).any()
    figure.savefig(tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 500


def test_the_curves_of_an_empty_journal_are_an_empty_figure(tmp_path: Path) -> None:
    Journal(tmp_path / "journal.jsonl").close()
    assert curves_figure(tmp_path / "journal.jsonl").axes == []


def test_the_cluster_grid_shows_each_cluster_with_its_own_tiles() -> None:
    assignments = np.array([2, 0, 2, 2, 0])
    tiles = np.repeat(assignments.astype(np.uint8) * 50, 8 * 8 * 3).reshape(5, 8, 8, 3)
    figure = cluster_figure(tiles, assignments, 4, columns=2)
    assert [axes.get_ylabel().split("\n")[:2] for axes in figure.axes] == [
        ["cluster 2", "3 tiles"],
        ["cluster 0", "2 tiles"],
    ]
    strips = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert [set(np.unique(strip)) for strip in strips] == [{100, 255}, {0, 255}]
    with pytest.raises(ValueError, match="one for each"):
        cluster_figure(tiles, assignments[:3])
