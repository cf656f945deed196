"""``ca2cl reproduce nct``: the whole job on made-up tissue, ended in every way, on two processes; and bad input."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ca2cl.cli import main
from ca2cl.cli.parser import parse
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.metrics import classification_metrics
from ca2cl.evaluation.probe.scoring import SGD, Scoring, classify
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import known_slides
from ca2cl.reproduce import run as nct
from ca2cl.reproduce.config import NctConfig, jobs, settled, tuning
from ca2cl.reproduce.datasets import MADE_UP
from ca2cl.reproduce.linear import LinearTrial, read_rows
from ca2cl.reproduce.published_results import FINETUNED, LINEAR
from ca2cl.reproduce.table import lines, notes, table
from tests.support.archives import serving, zipped
from tests.support.forked import Forked, ca2cl

TRAIN, TEST = "NCT-CRC-HE-100K", "CRC-VAL-HE-7K"
SMALL = (
    "--data", "tiles", "--output_dir", "job", "--encoder", "random:3", "--labels", "1.0", "--seeds", "2",
    "--epochs", "2", "--min_steps", "4", "--batch_size", "16", "--image_size", "32", "--workers", "0",
    "--norm", "frozen", "--optim.lr", "0.05",
)  # fmt: skip
VERB = ("reproduce", "nct", *SMALL)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tissue in the published layout, without the NONORM set."""
    folder = tmp_path_factory.mktemp("published")
    write_tissue(folder / TRAIN, 8, size=48, seed=0, suffix=".tif")
    write_tissue(folder / TEST, 4, size=48, seed=1, suffix=".tif")
    return folder


def store(tiles: Path) -> tuple[str, str]:
    """One MLflow store for all jobs here: to make one takes seconds."""
    return "--tracking.root", str(tiles.parent / "store")


def run_here(folder: Path, tiles: Path, *more: str) -> int:
    """The verb in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        if not Path("tiles").exists():
            Path("tiles").symlink_to(tiles)
        before = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1)]
        try:
            return main(["reproduce", "nct", *SMALL, *store(tiles), *more])
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "job" / "reproduce-results.json").read_text())
    return content


@pytest.fixture(scope="module")
def whole(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job that ran through, in one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert run_here(folder, tiles) == 0
    return folder


def test_every_cell_stands_beside_theirs(whole: Path) -> None:
    found = results(whole)
    rows = {(row["classifier"], row["budget"]): row for row in found["results"]}
    assert list(rows) == [("linear SGD", 1.0), ("linear", 1.0), ("fine-tuned", 1.0)]
    for (kind, budget), row in rows.items():
        theirs = (FINETUNED if kind == "fine-tuned" else LINEAR)["encoder"][budget]
        assert row["theirs"] == theirs._asdict() and len(row["seeds"]) == 2
        assert row["labelled"] == 72
        assert row["mean"]["accuracy"] == pytest.approx(np.mean([seed["accuracy"] for seed in row["seeds"]]))
    text = (whole / "job" / "reproduce.txt").read_text()
    assert "0.9645" in text and "Virchow2 0.967, UNI 0.944" in text and "LEAK" not in text
    assert "0.9689 ± 0.0007" in text and "0.9576 ± 0.0015" in text
    assert "fine-tuning is the mean ± sd of five logged seeds, the epoch chosen by 20,000 training tiles" in text
    assert "the same as theirs: encoder resnet18\n" in text and "32 px, theirs 224" in text
    assert (whole / "job" / "reproduce.png").stat().st_size > 10_000
    assert found["kind"] == "reproduce-nct" and found["leak"]["equal_test_tiles"] == 0
    assert found["leak"] == found["data"]["leak"] and len(found["classes"]) == 9


def test_a_linear_cell_is_what_its_file_says(whole: Path) -> None:
    cell = json.loads((whole / "job/linear" / f"{LinearTrial('linear', 1.0, 1).name}.json").read_text())
    assert cell["right"].count("1") / len(cell["right"]) == pytest.approx(cell["scores"]["accuracy"])
    assert np.trace(np.array(cell["confusion"])) == cell["right"].count("1") and cell["labelled"] == 72
    first = json.loads((whole / "job/linear" / f"{LinearTrial('linear', 1.0, 0).name}.json").read_text())
    assert first["scores"] == cell["scores"]  # all labels: the same tiles
    held = load_file(whole / "job/linear" / f"{LinearTrial('linear', 1.0, 1).name}.safetensors")
    right = held["probabilities"].argmax(1) == held["labels"]
    assert "".join("01"[hit] for hit in right.astype(int)) == cell["right"]


def test_calibration_is_in_the_results_and_a_folder_of_an_earlier_version_does_without(
    whole: Path, tmp_path: Path
) -> None:
    found = {row["classifier"]: row for row in results(whole)["results"]}
    assert all(len(row["calibration"]["raw"]) == 2 and len(row["recalls"]) == 9 for row in found.values())
    cells = sorted((whole / "job/linear").glob("linear-100pct-seed?.json"))
    temperatures = [json.loads(cell.read_text())["temperature"] for cell in cells]
    assert found["linear"]["calibration"]["temperatures"] == temperatures and len(temperatures) == 2
    text = (whole / "job" / "reproduce.txt").read_text()
    assert "recall by class with 95 %" in text and "calibration: ECE" in text
    shutil.copytree(whole / "job" / "linear", tmp_path / "linear")
    for path in (tmp_path / "linear").glob("*.safetensors"):
        path.unlink()
    job = NctConfig(encoder="random", data="none", output_dir=str(tmp_path), labels=(1.0,), seeds=2)
    rows = {row.classifier: row for row in read_rows(job)}
    assert rows["linear"].calibration is None and rows["linear"].interval[0] > 0
    assert rows["linear"].mean_sd("accuracy")[0] == pytest.approx(found["linear"]["mean"]["accuracy"])


def test_a_second_start_has_nothing_to_do_and_logs_nothing(
    whole: Path, tiles: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = results(whole)
    assert run_here(whole, tiles, "--plan") == 0
    lines = capfd.readouterr().out.splitlines()
    states = [line.split()[-1] for line in lines[2:-1]]
    assert lines[-1].startswith("times: estimated from a resnet18's on cpu")
    assert states == ["there"] * 2 + ["done"] * 7
    assert run_here(whole, tiles) == 0
    out = capfd.readouterr().out
    assert results(whole) == before and " already\n" in out


def test_the_run_is_tied_to_its_data_and_tells_both_numbers(whole: Path, tiles: Path) -> None:
    from mlflow import MlflowClient

    logged = json.loads((whole / "job" / "logged.json").read_text())["run_id"]
    run = MlflowClient(f"sqlite:///{store(tiles)[1]}/mlflow.db").get_run(logged)
    found = results(whole)
    (row,) = [r for r in found["results"] if (r["classifier"], r["budget"]) == ("fine-tuned", 1.0)]
    assert run.data.metrics["encoder/fine-tuned/100pct/accuracy"] == pytest.approx(row["mean"]["accuracy"])
    assert run.data.metrics["theirs/fine-tuned/100pct/accuracy"] == 0.9689
    assert run.data.tags["ca2cl.kind"] == "reproduce-nct" and run.info.status == "FINISHED"
    assert run.data.tags["ca2cl.train_manifest_digest"] == found["data"]["digests"][0]


def test_whether_fine_tuning_is_done_and_logged_is_left_to_itself(
    whole: Path, tiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between its table and its MLflow run, it has to go on."""
    started: list[FinetuneConfig] = []
    monkeypatch.setattr(nct.finetune, "run", lambda config: started.append(config) or 0)
    assert (whole / "job" / "finetune" / "finetune-results.json").exists()
    assert run_here(whole, tiles) == 0
    assert [config.note_protocol for config in started] == ["honest"]


def test_made_up_tissue_ranks_no_encoder_and_a_later_task_adds_its_rows(
    tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    shutil.copytree(tiles, tmp_path / "drawn")
    (tmp_path / "drawn" / MADE_UP).touch()
    only = ("--data", "drawn", "--seeds", "1", "--epochs", "1", "--min_steps", "1", "--tracking.experiment", "drawn")
    kinds = ["linear SGD", "linear", "fine-tuned"]
    for task, expected in (("linear", kinds[:2]), ("finetune", kinds), ("linear", kinds)):
        assert run_here(tmp_path, tiles, *only, "--tasks", task) == 0
        assert [row["classifier"] for row in results(tmp_path)["results"]] == expected, task
    assert " already\n" in capfd.readouterr().out
    text = (tmp_path / "job" / "reproduce.txt").read_text()
    assert "MADE-UP TISSUE" in text and "L-BFGS" in text and "fine-tuning for 1 epochs" in text
    client = MlflowClient(f"sqlite:///{store(tiles)[1]}/mlflow.db")
    experiment = client.get_experiment_by_name("drawn")
    assert experiment is not None
    tags = [run.data.tags for run in client.search_runs([experiment.experiment_id])]
    assert {one["ca2cl.kind"] for one in tags} == {"reproduce-nct", "finetune"}
    assert {one["ca2cl.protocol"] for one in tags} == {"made-up tissue"}


def test_a_tile_without_a_slide_leaves_the_others_apart() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(121) % 2
    values = (rng.normal(size=(121, 4)) + 3 * labels[:, None]).astype(np.float32)
    slides = [f"slide {row // 12}" for row in range(120)]
    rows = np.arange(120)  # this draw holds no tile without a slide
    found = [
        classify(SGD, values, labels, rows, values, labels, 0, Scoring(groups=known_slides(groups)))
        for groups in ([*slides, None], [None] * 121, [*slides, "slide 10"])
    ]
    assert np.array_equal(found[0].probabilities, found[2].probabilities), "whole slides are held out as before"
    assert not np.array_equal(found[0].probabilities, found[1].probabilities)


def until(process: Forked, reached: Callable[[], bool]) -> None:
    patience = time.monotonic() + 240
    while not reached() and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.002)
    assert process.poll() is None and reached()


def steps(job: Path, cell: str) -> int:
    journal = job / "finetune" / "cells" / cell / "journal.jsonl"
    return sum('"step"' in line for line in journal.read_text().splitlines()) if journal.exists() else 0


def test_killed_anywhere_it_goes_on_to_the_same_table(whole: Path, tiles: Path, tmp_path: Path) -> None:
    """In a linear cell; in a fine-tuning cell, by a scheduler; in a later one; each time by a real process."""
    (tmp_path / "tiles").symlink_to(tiles)
    job = tmp_path / "job"
    cells = [f"encoder-100pct-seed{seed}" for seed in (0, 1)]
    ends: list[tuple[int, int, Callable[[], bool]]] = [
        (signal.SIGKILL, -signal.SIGKILL, lambda: len(list(job.glob("linear/*-seed*.json"))) >= 1),
        (signal.SIGTERM, 85, lambda: steps(job, cells[0]) >= 2),
        (signal.SIGKILL, -signal.SIGKILL, lambda: steps(job, cells[1]) >= 2),
    ]
    left = []
    for number, code, reached in ends:
        process = Forked(tmp_path, *VERB, *store(tiles))
        until(process, reached)
        process.send_signal(number)
        assert process.wait(timeout=240) == code, process.stderr()
        left.append((len(list(job.glob("linear/*-seed*.json"))), len(list(job.glob("finetune/cells/*/result.json")))))
    assert 1 <= left[0][0] < 4 and left[1:] == [(4, 0), (4, 1)], left
    assert run_here(tmp_path, tiles) == 0
    assert results(tmp_path)["results"] == results(whole)["results"]
    assert (job / "reproduce.txt").read_text() == (whole / "job" / "reproduce.txt").read_text()
    assert not list(job.rglob("*.tmp*"))


@pytest.mark.slow
def test_two_processes_fill_the_same_table(whole: Path, tiles: Path, tmp_path: Path) -> None:
    (tmp_path / "tiles").symlink_to(tiles)
    done = ca2cl(tmp_path, *VERB, *store(tiles), processes=2)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(results(tmp_path)["results"], results(whole)["results"], strict=True):
        assert ours["mean"]["accuracy"] == pytest.approx(theirs["mean"]["accuracy"], abs=0.06), ours["classifier"]
    assert done.stdout.count("linear SGD  100 %") == 1 and done.stdout.count("already complete") == 0
    assert done.stdout.count("\nnext  ") == 1  # of reproduce, none of the verbs that it runs


def test_it_downloads_unpacks_and_goes_no_further_than_it_can(
    tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = {name: {str(p.relative_to(tiles)): p.read_bytes() for p in (tiles / name).rglob("*.tif")}
            for name in (TRAIN, TEST)}  # fmt: skip
    only = ("--data", "got", "--download", "--tasks", "linear", "--labels", "1.0", "--seeds", "1")
    with serving({f"{name}.zip": zipped(files) for name, files in sets.items()}) as zenodo:
        zenodo.cuts = [150_000, 100_000]
        zenodo.spoilt = {f"{TEST}.zip"}
        assert run_here(tmp_path, tiles, *only, "--record_url", zenodo.record_url) == 2
        error = capfd.readouterr().err.splitlines()[-1]
        assert f"/{TEST}.zip/content: its md5 is " in error and "run again" in error
        assert (tmp_path / "got" / TRAIN).is_dir() and not (tmp_path / "got" / TEST).exists()
        zenodo.spoilt, zenodo.asked = set(), []
        assert run_here(tmp_path, tiles, *only, "--record_url", zenodo.record_url) == 0
        assert zenodo.asked == [""]  # the other is there
    assert run_here(tmp_path, tiles, *only, "--record_url", "http://127.0.0.1:9") == 0  # no need of it any more
    assert [row["classifier"] for row in results(tmp_path)["results"]] == ["linear SGD", "linear"]


def test_a_set_that_was_sharded_is_taken_and_a_shared_tile_is_told(tiles: Path, tmp_path: Path) -> None:
    write_tissue(tmp_path / "mine" / TRAIN, 3, size=48, seed=5, suffix=".tif")
    shutil.copytree(tmp_path / "mine" / TRAIN, tmp_path / "source")
    shutil.copy(next((tiles / TEST / "TUM").iterdir()), tmp_path / "source" / "TUM" / "again.tif")
    assert main(["shard", str(tmp_path / "source"), str(tmp_path / "mine" / TEST), "--workers", "1"]) == 0
    only = ("--data", "mine", "--tasks", "linear", "--labels", "1.0", "--seeds", "1", "--protocol", "original")
    assert run_here(tmp_path, tiles, *only) == 0
    text = (tmp_path / "job" / "reproduce.txt").read_text()
    assert "LEAK: 27 of 28 test tiles are training tiles too" in text
    assert "the test tiles chose the model" in text and results(tmp_path)["kind"] == "reproduce-nct"
    (row,) = results(tmp_path)["results"]  # their linear probe, trained on augmented tiles
    assert row["classifier"] == "linear head" and row["theirs"] == LINEAR["encoder"][1.0]._asdict()
    assert "linear probe, what still differs from the authors' code: batch_size 16, theirs 128; min_steps 4" in text
    assert "norm frozen, theirs sync" in text and "epochs 2, theirs 100;" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--data", "nowhere"),
            f"nowhere/{TRAIN}: not there; give the folder that holds it as data, or use --download",
        ),
        (("--train_set", "NCT-CRC-HE-100K-NONORM"), "tiles/NCT-CRC-HE-100K-NONORM: not there"),
        (("--tasks", "linear", "detect"), "tasks has 'detect'"),
        (("--labels", "0"), "labels is 0"),
        (("--seeds", "0"), "seeds is 0"),
        (("--image_size", "8"), "image_size is 8"),
        (("--output_dir", "tiles"), "output_dir is 'tiles', the folder of data"),
        (("--output_dir", "used"), "is not empty and holds no such job"),
        (("--miniature", "--download"), "download with miniature"),
        (("--miniature",), "holds tiles that were not drawn"),
        (("--record_url", "zenodo"), "record_url is 'zenodo'"),
        (("--encoder", "random:x"), "the seed is no number"),
        (("--sedes", "3"), "did you mean seeds?"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    code = run_here(tmp_path, tiles, *arguments)
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error: ")]
    assert code == 2 and len(error) == 1 and message in error[0], error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes.txt", "tiles", "used"]


def test_classes_that_train_lacks_and_other_jobs_folders_are_refused(
    whole: Path, tiles: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(whole, tiles, "--optim.lr", "0.5") == 2
    assert "holds another job (optim.lr " in capfd.readouterr().err.splitlines()[-1]
    assert run_here(whole, tiles, "--encoder", "random:4") == 2
    assert (
        "holds another job (encoder random:3 -> random:4, encoder_weights " in capfd.readouterr().err.splitlines()[-1]
    )
    shutil.copytree(tiles, tmp_path / "fewer")
    shutil.rmtree(tmp_path / "fewer" / TRAIN / "TUM")
    assert run_here(tmp_path, tiles, "--data", "fewer") == 2
    assert "classes differ between train and test: TUM only in" in capfd.readouterr().err.splitlines()[-1]


def test_miniature_settings_are_small_only_where_none_were_given() -> None:
    config = parse("reproduce nct", ["--encoder", "random", "--data", "d", "--miniature", "--epochs", "20"])
    small = settled(config)
    assert (small.seeds, small.epochs, small.image_size) == (2, 20, 48)
    full = settled(NctConfig(encoder="random", data="d"))
    assert (full.seeds, full.epochs, full.min_steps, full.image_size) == (5, 20, 200, None)
    assert tuning(config).epochs == 20 and tuning(config).against == () and tuning(config).tracking.register_as is None


def test_fine_tuning_is_the_same_job_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tuning(NctConfig(encoder="random", data="d", output_dir="job"))
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    there = tuning(NctConfig(encoder="random", data="../d", output_dir="../job"))
    assert (here.train, here.test) == (there.train, there.test)
    assert here.train == str(tmp_path.resolve() / "job" / "shards" / TRAIN)


def test_fine_tuning_goes_by_the_job_s_protocol() -> None:
    for protocol in ("honest", "original"):
        config = parse("reproduce nct", ["--encoder", "random", "--data", "d", "--protocol", protocol])
        assert tuning(config).protocol == protocol and tuning(config).labels == config.labels
        assert jobs(config) == (["all"] if protocol == "honest" else ["head", "all"])
        assert jobs(replace(config, tasks=("linear",))) == ([] if protocol == "honest" else ["head"])


def test_a_budget_that_is_not_theirs_has_no_number_of_theirs() -> None:
    labels = np.array([0, 0, 1, 1])
    metrics = [classification_metrics(labels, np.eye(2)[labels])]
    rows = [Row("encoder", "linear", budget, 2, metrics, [{}], (1.0, 1.0)) for budget in (0.01, 0.2)]
    shown = lines(rows)
    first, second = table(shown).splitlines()[2:]
    assert first.split()[-1] == "0.953" and "0.9653" in first and second.split()[-1] == "-"
    facts = {"arch": "resnet18", "image_size": 224, "tiles": [100_000, 7180], "test_tiles_published": 7180,
             "leak": {"same_manifest": False, "equal_test_tiles": 0}}  # fmt: skip
    config = settled(NctConfig(encoder="random", data="d", protocol="original"))
    (same,) = [note for note in notes(config, facts, made_up=False) if note.startswith("the same")]
    assert same == "the same as theirs: test set CRC-VAL-HE-7K; encoder resnet18; 224 px; protocol original"
