"""What commit f1aef52 made is taken: shards, runs, checkpoints, registered encoders, results, detectors.

``artefacts/make.py`` made it all with that version's code. Numbers are compared with those that that version had.
"""

from __future__ import annotations

import json
import math
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow.parquet
import pytest
import torch

from ca2cl.cli import main
from ca2cl.data.shards.index import ShardIndex, read_manifest
from ca2cl.registry.resolve import resolve_encoder
from tests.support.jobs import ROOT
from tests.support.pages import Page

ARTEFACTS = Path(__file__).parent / "artefacts"
FACTS = json.loads((ARTEFACTS / "f1aef52.json").read_text())
SMOKE = (
    "pretrain", "--recipe", "smoke", "--data.shards", "shards/train", "--data.lanes", "4",
    "--objective.clusters", "4", "--run.batch_size", "16", "--run.keep_last", "1",
)  # fmt: skip
FINISHED = (*SMOKE, "--run.output_dir", "run", "--tracking.run_name", "finished", "--run.steps")
STOPPED = (
    *SMOKE, "--run.output_dir", "stopped", "--tracking.run_name", "stopped", "--run.steps", "4",
    "--model.norm", "lane_group", "--model.norm_group", "4",
)  # fmt: skip
DATA = ("--train", "shards/train", "--test", "shards/test", "--workers", "0")
PROBE = ("--labels", "0.5", "1.0", "--seeds", "2", "--imagenet", "false", "--floors", "false")
TUNE = (
    "--output_dir", "tuned", "--against", "[]", "--labels", "1.0", "--seeds", "1", "--epochs", "2",
    "--min_steps", "4", "--batch_size", "16",
)  # fmt: skip
DETECT = (
    "detect", "--engine", "torchvision", "--encoder", "random:3", "--against", "[]", "--dataset", "glas",
    "--data", "glas", "--output_dir", "glands", "--iterations", "1", "--batch_size", "1", "--train_sides", "48",
    "--test_side", "64", "--workers", "0", "--precise_norm", "false",
)  # fmt: skip
"""The commands of ``artefacts/make.py``."""
Place = Callable[..., Path]


def unpacked(name: str, folder: Path) -> Path:
    """One of the archives. Its larger equal files are links to one another: what changes files needs a copy."""
    with tarfile.open(ARTEFACTS / f"f1aef52-{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything but the detector, to be read only."""
    folder = unpacked("runs", tmp_path_factory.mktemp("made"))
    if metadata.version("mlflow") != FACTS["mlflow"]:  # what MLflow asks of the owner of a store after an upgrade
        store = f"sqlite:///{folder}/ca2cl-runs/mlflow.db"
        subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", store], check=True, capture_output=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def read(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory."""
    monkeypatch.chdir(made)
    return made


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """Makes a working directory of copies: shards, the store's database, and what is named; ``encoders``: with the
    files of the store, too, to be read only."""

    def copied(*names: str, encoders: bool = False) -> Path:
        store = tmp_path / "ca2cl-runs"
        store.mkdir()
        shutil.copy(made / "ca2cl-runs" / "mlflow.db", store)
        if encoders:
            (store / "artifacts").symlink_to(made / "ca2cl-runs" / "artifacts")
        for name in ("shards", *names):
            shutil.copytree(made / name, tmp_path / name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    yield copied
    shutil.rmtree(tmp_path)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]


def run_id(folder: Path, run: str = "run") -> str:
    return str(json.loads((folder / run / "run.json").read_text())["run_id"])


def vectors(path: Path) -> np.ndarray:
    return np.stack(pyarrow.parquet.read_table(path)["vector"].to_numpy())


def results(path: Path) -> dict[tuple[Any, ...], dict[str, float]]:
    """Scores by features, classifier and budget."""
    rows = json.loads(path.read_text())["results"]
    return {(row["features"], row["classifier"], row["budget"]): row["mean"] for row in rows}


def same_steps(run: Path, name: str) -> None:
    """The journal ends with the steps that f1aef52 itself did next: the same tiles at the same rates, in views that
    have been corrected since (``views.batch.VERSION``), so that losses differ a little."""
    wanted = FACTS["continued"][name]
    found = [line for line in lines(run) if "step" in line][-len(wanted) :]
    for old, now in zip(wanted, found, strict=True):
        for number in ("step", "epoch", "samples", "lr"):
            assert math.isclose(now[number], old[number], rel_tol=1e-9), (number, old, now)
        for number in ("loss", "nt_xent", "cluster", "nt_xent_adversarial"):
            assert math.isclose(now[number], old[number], rel_tol=0.2), (number, old, now)


def test_an_encoder_goes_by_all_its_names(read: Path) -> None:
    """The store was made elsewhere: what the database tells of its folder is no longer there."""
    run = run_id(read)
    names = (
        "run", "run/encoder", "run/encoder/encoder.safetensors", run, run[:8], f"runs:/{run}", "1", "champion",
        "models:/ca2cl-encoder/1", "models:/ca2cl-encoder@champion",
    )  # fmt: skip
    first = resolve_encoder("run")
    assert (first.card.step, first.card.classes, first.card.input_size) == (3, ("ADI", "LYM", "TUM"), 32)
    for name in names:
        found = resolve_encoder(name)
        assert found.card == first.card and found.card.source_run_id == run
        assert all(map(torch.equal, found.encoder.state_dict().values(), first.encoder.state_dict().values()))
    classifier = resolve_encoder("tuned/cells/encoder-100pct-seed0/classifier")
    assert classifier.card.predicts == ("ADI", "LYM", "TUM")
    assert resolve_encoder("latest").card.origin == "random:1"


def test_features_are_the_same(read: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["embed", "--encoder", run_id(read), "shards/test", "--workers", "0"]
    assert main([*command, str(tmp_path / "vectors.parquet")]) == 0
    np.testing.assert_allclose(vectors(tmp_path / "vectors.parquet"), vectors(read / "vectors.parquet"), rtol=1e-3)
    capsys.readouterr()
    assert main([*command, "vectors.parquet"]) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.slow
def test_a_registered_model_answers_by_mlflow_alone(made: Path, tmp_path: Path) -> None:
    """In a process that has not imported ca2cl, the model runs the code that lies in it."""
    store = tmp_path / "mlflow.db"
    shutil.copy(made / "ca2cl-runs" / "mlflow.db", store)
    root = json.loads((made / "run" / "run.json").read_text())["tracking_uri"].removeprefix("sqlite:///")
    moved = (str(Path(root).parent), f"{made}/ca2cl-runs")
    with sqlite3.connect(store) as opened:  # MLflow goes by the whole paths in the database: as if nothing had moved
        for column in ("source", "storage_location"):
            opened.execute(f"UPDATE model_versions SET {column} = replace({column}, ?, ?)", moved)
    script = (
        "import sys, mlflow, numpy\n"
        f"mlflow.set_tracking_uri('sqlite:///{store}')\n"
        "model = mlflow.pyfunc.load_model('models:/ca2cl-encoder/1')\n"
        f"numpy.save('out.npy', model.predict([open({str(tile(made, tmp_path))!r}, 'rb').read()]))\n"
        "print(sys.modules['ca2cl'].__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not Path(done.stdout.splitlines()[-1]).is_relative_to(ROOT)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), vectors(made / "vectors.parquet")[:1], rtol=1e-3)


def test_a_registered_model_answers_beside_todays_package(made: Path, tmp_path: Path) -> None:
    """Its file imports ``ca2cl.tracking.serving``, which is then that of the package which is imported already."""
    (model,) = made.glob(f"ca2cl-runs/artifacts/{run_id(made)}/artifacts/model-*")
    path = list(sys.path)
    try:
        found = mlflow.pyfunc.load_model(str(model)).predict([tile(made, tmp_path).read_bytes()])
    finally:
        sys.path[:] = path
    np.testing.assert_allclose(found, vectors(made / "vectors.parquet")[:1], rtol=1e-3)


def tile(made: Path, folder: Path) -> Path:
    """The first test tile as a file, from its tar."""
    with tarfile.open(made / "shards" / "test" / "shard-000000.tar") as shard:
        member = next(one for one in shard if one.name.endswith(".png"))
        source = shard.extractfile(member)
        assert source is not None
        (folder / "tile.png").write_bytes(source.read())
    return folder / "tile.png"


def test_the_registry_is_listed_compared_and_moved(
    made: Path, place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*words: str, code: int = 0) -> str:
        assert main(["encoders", *words]) == code
        return capsys.readouterr().out

    place(encoders=True)
    metric = "encoder/linear/100pct/macro_f1"
    listed = json.loads(told("list", "--json"))
    assert [(one["version"], one["aliases"], one["downstream_runs"]) for one in listed] == [
        (2, [], 1),
        (1, ["champion"], 2),
    ]
    shown = told("show", "1")
    assert "3 steps" in shown and "(finished, FINISHED)" in shown and "encoder/fine-tuned/100pct/accuracy" in shown
    scores = [results(made / name)["encoder", "linear", 1.0]["macro_f1"] for name in ("probe.json", "probe-2.json")]
    compared = told("compare", "1", "2", "--metric", metric)
    assert all(f"{score:.4f}" in compared for score in scores) and scores[0] != scores[1]
    worse, better = ("1", "2") if scores[0] < scores[1] else ("2", "1")
    told("promote", worse)
    assert "promoted" in told("promote", better, "--if-better", metric, "--exit-code")
    assert "kept" in told("promote", worse, "--if-better", metric, "--exit-code", code=3)


def test_the_same_tiles_become_the_same_shards(made: Path, tmp_path: Path) -> None:
    before = made / "shards" / "test"
    index, wanted = ShardIndex(before), read_manifest(before / "manifest.json")
    for shard, samples in zip(index.shards, index, strict=True):
        with tarfile.open(before / shard.name) as tar:
            for key, ext in zip(samples.key, samples.ext, strict=True):
                tile, about = tar.extractfile(f"{key}.{ext}"), tar.extractfile(f"{key}.json")
                assert tile is not None and about is not None
                path = tmp_path / "test" / json.loads(about.read())["name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tile.read())
    again = tmp_path / "again"
    settings = ("--group_pattern", "([ST][0-9])-", "--samples_per_shard", "20", "--workers", "1")
    assert main(["shard", str(tmp_path / "test"), str(again), *settings]) == 0
    assert read_manifest(again / "manifest.json") == wanted
    for shard in index.shards:
        assert (again / shard.name).read_bytes() == (before / shard.name).read_bytes()


def test_a_probe_reads_the_shards_and_scores_as_it_did(made: Path, place: Place) -> None:
    """Of the classifiers logistic regression alone is the same: k-NN is centred now, SGD has another rate."""
    folder = place("run")
    command = ("probe", "--encoder", "run", *DATA, *PROBE, "--classifiers", "logistic", "--output", "now.json")
    assert main(command) == 0
    now, old = results(folder / "now.json"), results(made / "probe.json")
    assert len(now) == 2
    for row in now:
        assert now[row] == pytest.approx(old[row], abs=1e-6)


def test_the_report_shows_old_results(read: Path, tmp_path: Path) -> None:
    assert main(["report", run_id(read), str(tmp_path / "page.html"), "--workers", "0", "--no-log"]) == 0
    page, tuned = Page(tmp_path / "page.html"), results(read / "tuned" / "finetune-results.json")
    assert page.missing() == []
    for scores in (*results(read / "probe.json").values(), *tuned.values()):
        assert f"{scores['macro_f1']:.3f}" in page.text
    assert "fine-tuned" in page.text and "colour histogram" in page.text


def test_sync_sends_what_a_killed_run_had_to_keep(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Where a store was moved, ``--uri`` says where it is: f1aef52 did not write down where it lay beside the run."""
    folder = place("run", "away")
    uri = f"sqlite:///{folder}/ca2cl-runs/mlflow.db"
    assert main(["sync", "run", "--uri", uri]) == 0
    assert "already has all" in capsys.readouterr().out
    assert run_id(folder, "away") == ""
    assert main(["sync", "away", "--uri", uri]) == 0
    client = mlflow.MlflowClient(uri)
    run = client.get_run(run_id(folder, "away"))
    sent = client.get_metric_history(run.info.run_id, "loss")
    assert [one.value for one in sent] == [line["loss"] for line in lines(folder / "away") if "step" in line]
    assert run.info.run_name == "away" and len(sent) == 3 and run.data.params["optim.lr"] == "0.05"


def test_a_finished_run_is_left_alone_and_may_be_made_longer(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = place("run")
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    assert main([*FINISHED, "3"]) == 0
    # f1aef52 went through its end once more
    assert {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")} == before
    # f1aef52 went on with whatever settings it was given
    assert main([*FINISHED, "4", "--optim.lr", "0.1"]) == 2
    assert "optim.lr 0.05 -> 0.1" in capsys.readouterr().err
    caplog.clear()
    assert main([*FINISHED, "4"]) == 0
    same_steps(folder / "run", "run")
    (changed,) = (line for line in caplog.messages if "changed settings" in line)
    assert changed.endswith(": run.steps 3 -> 4")  # and not settings that f1aef52 did not have
    assert json.loads((folder / "run" / "encoder" / "card.json").read_text())["step"] == 4


def test_a_stopped_run_goes_on_to_the_same_losses(
    place: Place, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = place("stopped")
    # Blocks have four groups by default now. A run keeps those of two that it was begun with: the line says how.
    assert main(list(STOPPED)) == 2
    assert "go on with --model.norm_block 2" in capsys.readouterr().err
    assert main(["pretrain", "--config", "stopped/config.yaml", "--model.norm_block", "2"]) == 0
    same_steps(folder / "stopped", "stopped")
    assert any("was trained on views of version 1; it continues with version 2" in line for line in caplog.messages)
    assert lines(folder / "stopped")[-1] == {**lines(folder / "stopped")[-1], "event": "status", "status": "FINISHED"}


def test_a_fine_tuning_folder_is_the_same_job(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells are kept. The report is written anew, with today's intervals."""
    folder = place("run", "tuned", encoders=True)
    cell, old = folder / "tuned" / "cells" / "encoder-100pct-seed0", results(folder / "tuned" / "finetune-results.json")
    before = {path: path.stat().st_mtime_ns for path in cell.rglob("*")}
    command = ["finetune", "--encoder", run_id(folder), *DATA, *TUNE]
    assert main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in cell.rglob("*")} == before
    assert results(folder / "tuned" / "finetune-results.json") == old
    capsys.readouterr()
    assert main([*command, "--patience", "2"]) == 2
    assert "another job (patience 5 -> 2)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_detector_finds_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(unpacked("detector", tmp_path))
    detector = "glands/cells/encoder-seed0/detector"
    assert main(["detect", "predict", detector, "glas/testA", "now", "--truth", "glas/testA.json"]) == 0
    old, now = (json.loads(Path(name, "predictions.json").read_text()) for name in ("found", "now"))
    assert len(old["annotations"]) == len(now["annotations"]) > 0
    for one, other in zip(old["annotations"], now["annotations"], strict=True):
        assert other["score"] == pytest.approx(one["score"], abs=1e-4)
        assert other["bbox"] == pytest.approx(one["bbox"], abs=1e-2)
    assert {name: now["info"]["scores"][name] for name in ("box/AP", "box/AP50")} == pytest.approx(
        {name: old["info"]["scores"][name] for name in ("box/AP", "box/AP50")}
    )
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_detection_folder_is_the_same_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(unpacked("detector", tmp_path))
    old = json.loads(Path("glands/detect-results.json").read_text())["trainings"]
    # The default is the authors' own warm-up now, and a folder keeps the one that it was begun with.
    assert main(list(DETECT)) == 2
    assert "warmup 100 -> 1000" in capsys.readouterr().err
    assert main([*DETECT, "--warmup", "100"]) == 0
    assert json.loads(Path("glands/detect-results.json").read_text())["trainings"] == old
    shutil.rmtree(tmp_path)
