"""``ca2cl detect``: from images with masks to tables, again, stopped in the middle, on two processes, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from ca2cl.cli import main
from ca2cl.common.job_dir import JobDir
from ca2cl.detection.coco.files import decode_mask, read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.engines.predictions import coco_results
from ca2cl.detection.engines.torchvision import TorchvisionEngine
from tests.support.forked import CODE, Forked
from tests.support.gland_images import write_glands
from tests.support.jobs import LAUNCH, start
from tests.support.ports import free_port

SMALL = (
    "--engine", "torchvision", "--encoder", "random:3", "--dataset", "glas", "--iterations", "2", "--batch_size", "1",
    "--lr", "0.01",
    "--train_sides", "32", "48", "--test_side", "32", "--workers", "0", "--precise_norm", "false",
    "--checkpoint_every", "2", "--evaluate_every", "1",
)  # fmt: skip


@pytest.fixture(scope="module")
def glas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glands(tmp_path_factory.mktemp("glas") / "in", 3, 2, 80, 100, suffix=".png")


def detect(glas: Path, folder: Path, *more: str) -> int:
    where = ("--data", str(glas), "--output_dir", str(folder / "job"), "--tracking.root", str(folder / "store"))
    return main(["detect", *SMALL, *where, *more])


@pytest.fixture(scope="module")
def done(glas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("detect")
    assert detect(glas, folder) == 0
    return folder


def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "job" / "detect-results.json").read_text()))


def test_a_job_leaves_scores_that_its_predictions_have(done: Path) -> None:
    found = results(done)
    assert [(one["start"], one["seed"], one["steps"]) for one in found["trainings"]] == [
        ("encoder", 0, 2),
        ("random", 0, 2),
    ]
    assert found["made_by"]["engine"] == "torchvision" and found["made_by"]["iterations"] == 2
    split = CocoSplit.of(done / "job" / "data", "testA")
    truth = read_coco(split.annotations)
    cell = done / "job" / "cells" / "encoder-seed0"
    rows = json.loads((cell / "predictions" / "testA.json").read_text())
    told = found["trainings"][0]["scores"]["testA"]
    assert {name: told[name] for name in told if "/" in name} == pytest.approx(coco_scores(truth, rows))
    assert 0 <= told["f1"] <= 1 and 0 <= told["dice"] <= 1 and told["hausdorff"] > 0
    detector = TorchvisionEngine().load(cell / "detector")
    again = [
        row
        for image, one in zip(truth["images"], detector.predict(map(split.read, truth["images"])), strict=True)
        for row in coco_results(image["id"], one, [1])
    ]
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in again]
    np.testing.assert_allclose([row["score"] for row in rows], [row["score"] for row in again], atol=1e-5)


def test_every_training_is_a_live_run_and_the_job_is_one(done: Path) -> None:
    client = MlflowClient(f"sqlite:///{done / 'store' / 'mlflow.db'}")
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    named = {run.info.run_name: run for run in runs}
    assert set(named) == {"detect glas from random:3", "detect-encoder-seed0", "detect-random-seed0"}
    assert {run.info.status for run in runs} == {"FINISHED"}
    training = named["detect-encoder-seed0"]
    assert training.data.tags["ca2cl.kind"] == "detect-training"
    assert training.data.tags["ca2cl.engine"].startswith("torchvision 0.")
    assert [point.step for point in client.get_metric_history(training.info.run_id, "loss_mask")] == [1, 2]
    scored = client.get_metric_history(training.info.run_id, "testA/box/AP")
    assert [point.step for point in scored] == [1, 2]
    artifacts = {entry.path for entry in client.list_artifacts(training.info.run_id)}
    assert {"detector", "predictions", "figures", "result.json", "config.yaml"} <= artifacts
    job = named["detect glas from random:3"]
    assert training.data.tags["mlflow.parentRunId"] == job.info.run_id
    inputs = {one.dataset.name: json.loads(one.dataset.profile) for one in job.inputs.dataset_inputs}
    assert {name: found["num_rows"] for name, found in inputs.items()} == {"data/train": 3, "data/testA": 2}
    assert inputs["data/train"]["counts"]["gland"] > 0 and "AP box" in job.data.tags["mlflow.note.content"]
    assert job.data.tags["ca2cl.kind"] == "detect-torchvision" and "ca2cl.engine" in job.data.tags
    assert job.data.metrics["encoder/testA/box/AP"] == pytest.approx(scored[-1].value)
    assert "against/random/testA/mask/AP" in job.data.metrics


def test_a_finished_job_started_again_only_tells(glas: Path, done: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = done / "job" / "cells" / "encoder-seed0" / "detector" / "detector.safetensors"
    before = weights.stat().st_mtime_ns
    assert detect(glas, done) == 0
    told = capfd.readouterr().out
    assert weights.stat().st_mtime_ns == before
    assert "AP box" in told and "encoder less random, testA, AP box:" in told and "already" in told
    assert "one seed, which says little" in told
    assert detect(glas, done, "--lr", "0.02") == 2
    assert "holds another job (lr 0.01 -> 0.02)" in capfd.readouterr().err


def test_a_second_job_keeps_out_of_the_folder(glas: Path, done: Path) -> None:
    code = (
        "import sys, ca2cl.common.job_dir as folder\nfolder.LOCK_S = 0.3\n"
        "from ca2cl.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    verb = ("detect", *SMALL, "--data", str(glas), "--output_dir", str(done / "job"))
    with JobDir(done / "job").locked():
        second = Forked(done, code, *verb, "--tracking.root", str(done / "store"), module=CODE)
        assert second.wait(timeout=300) == 2
    assert "another job is writing here; wait for it, or end it" in second.stderr()


def test_a_job_that_is_signalled_goes_on_to_the_same_scores(glas: Path, tmp_path: Path) -> None:
    more = ("--against", "[]", "--iterations", "6", "--head", "retinanet_fpn", "--evaluate_every", "0")
    assert detect(glas, tmp_path / "whole", *more) == 0
    journal = tmp_path / "parts" / "job" / "cells" / "encoder-seed0" / "journal.jsonl"

    def signal_after_a_step() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not (journal.exists() and '"loss"' in journal.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=signal_after_a_step)
    sender.start()
    try:
        assert detect(glas, tmp_path / "parts", *more) == 85
    finally:
        sender.join()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # another start is another process: its flag is a new one
    assert not (journal.parent / "result.json").exists()
    assert detect(glas, tmp_path / "parts", *more) == 0
    whole, parts = (results(tmp_path / name)["trainings"][0]["scores"] for name in ("whole", "parts"))
    assert whole == parts and "mask/AP" not in whole["testA"] and "f1" not in whole["testA"]
    weights = "job/cells/encoder-seed0/detector/detector.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "parts" / weights).read_bytes()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert sorted({line["step"] for line in lines if "lr" in line}) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_two_processes_train_and_score_together(glas: Path, tmp_path: Path) -> None:
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    verb = ["-m", "ca2cl", "detect", *SMALL, "--data", str(glas), "--output_dir", "job", "--against", "[]"]
    verb += ["--batch_size", "2"]
    ended: subprocess.CompletedProcess[str] = start(
        [*launch, "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", *verb], tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    (training,) = results(tmp_path)["trainings"]
    assert training["steps"] == 2 and ended.stdout.count("AP box") == 1
    rows = json.loads((tmp_path / "job" / "cells" / "encoder-seed0" / "predictions" / "testA.json").read_text())
    truth = read_coco(tmp_path / "job" / "data" / "testA.json")
    scores = {name: value for name, value in training["scores"]["testA"].items() if "/" in name}
    assert coco_scores(truth, rows) == pytest.approx(scores)


@pytest.mark.slow
def test_a_detector_learns_to_find_made_up_glands(tmp_path: Path) -> None:
    glas = write_glands(tmp_path / "in", 8, 4, 120, 160, suffix=".png")
    more = ("--iterations", "120", "--batch_size", "4", "--lr", "0.02", "--train_sides", "120", "--test_side", "120")
    assert detect(glas, tmp_path, *more, "--evaluate_every", "0", "--against", "[]", "--precise_norm", "true") == 0
    (training,) = results(tmp_path)["trainings"]
    assert training["scores"]["testA"]["box/AP50"] > 0.5 and training["scores"]["testA"]["f1"] > 0.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "0"), "seeds is 0"),
        (("--times", "-1"), "times is -1.0"),
        (("--data", "nowhere"), "data is 'nowhere': no folder there"),
        (("--dataset", "coco"), "has no train.json; make it with `ca2cl detect prepare masks`"),
        (("--dataset", "crag"), "not CRAG's layout"),
        (("--head", "mask_rcnn_c4"), "head is 'mask_rcnn_c4': the engine torchvision has"),
        (("--against", "random", "random"), "against names one encoder twice"),
        (("--encoder", "nothing"), "encoder 'nothing'"),
        (("--longest_side", "40"), "longest_side is 40"),
        (("--frozen_stages", "9"), "frozen_stages is 9"),
        (("--tracking.register_as", "x"), "tracking.register_as is for encoders"),
        (("--iteratons", "3"), "did you mean iterations?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    glas: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    assert detect(glas, tmp_path, *arguments) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error")]
    assert len(error) == 1 and message in error[0], error
    assert not (tmp_path / "job").exists()


@pytest.mark.skipif(find_spec("detectron2") is not None, reason="detectron2 is installed here")
def test_without_detectron2_a_job_says_how_to_get_it(
    glas: Path, done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = "detectron2 is not installed; it has no wheels, build it: pip install --no-build-isolation git+https://"
    assert detect(glas, done, "--engine", "auto") == 0  # what auto means here: the same job
    told = [line for line in capfd.readouterr().err.splitlines() if "detectron2" in line]
    assert len(told) == 1 and told[0].startswith("engine torchvision; --engine detectron2 is the other one")
    assert detect(glas, tmp_path, "--engine", "detectron2") == 2
    assert recipe in capfd.readouterr().err and not (tmp_path / "job").exists()
    assert detect(glas, done) == 0
    assert "detectron2" not in capfd.readouterr().err
    saved = tmp_path / "saved"
    shutil.copytree(done / "job" / "cells" / "encoder-seed0" / "detector", saved)
    card = saved / "detector.json"
    card.write_text(card.read_text().replace('"torchvision"', '"detectron2"'))
    assert predict(str(saved), done / "job" / "data" / "testA", tmp_path / "out") == 2
    assert recipe in capfd.readouterr().err


def test_the_family_and_the_verb_share_their_first_word(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "--help"]) == 0
    told = capfd.readouterr().out
    assert "usage: ca2cl detect" in told and "detect prepare" in told
    assert main(["detect", "prepar"]) == 2
    assert "did you mean detect prepare?" in capfd.readouterr().err
    assert main(["detect"]) == 2


def predict(detector: str, images: Path, out: Path, *more: str) -> int:
    return main(["detect", "predict", detector, str(images), str(out), "--device", "cpu", *more])


def test_predicting_gives_masks_overlays_and_the_scores_of_the_training(
    done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cell, data = done / "job" / "cells" / "encoder-seed0", done / "job" / "data"
    truth = ("--truth", str(data / "testA.json"))
    assert predict(str(cell / "detector"), data / "testA", tmp_path / "out", *truth, "--min_score", "0.1") == 0
    assert "2 images, " in capfd.readouterr().out
    found = read_coco(tmp_path / "out" / "predictions.json")
    told = results(done)["trainings"][0]["scores"]["testA"]
    scored = found["info"]["scores"]
    assert {k: v for k, v in scored.items() if "/" in k} == pytest.approx({k: v for k, v in told.items() if "/" in k})
    assert {"f1", "dice", "hausdorff"} <= scored.keys()
    for image in found["images"]:
        name = Path(image["file_name"]).with_suffix(".png")
        rows = [row for row in found["annotations"] if row["image_id"] == image["id"]]
        mask_HW = np.asarray(Image.open(tmp_path / "out" / "masks" / name))
        assert mask_HW.dtype == np.uint16 and mask_HW.shape == (image["height"], image["width"])
        sure = sorted((row for row in rows if row["score"] >= 0.1), key=lambda row: -row["score"])
        assert len(sure) >= mask_HW.max()
        if sure:  # nothing lies on top of the best
            np.testing.assert_array_equal(mask_HW == 1, decode_mask(sure[0]["segmentation"], *mask_HW.shape))
        before = np.asarray(Image.open(data / "testA" / image["file_name"]).convert("RGB"))
        overlay = np.asarray(Image.open(tmp_path / "out" / "overlays" / name))
        assert overlay.shape == before.shape and (overlay != before).any() == bool(mask_HW.any())
    run_id = json.loads((cell / "result.json").read_text())["run_id"]
    more = ("--tracking.root", str(done / "store"), "--overlays", "false")
    assert predict(run_id[:8], data / "testA", tmp_path / "again", *more) == 0
    again = read_coco(tmp_path / "again" / "predictions.json")
    assert [row["score"] for row in again["annotations"]] == [row["score"] for row in found["annotations"]]
    assert not (tmp_path / "again" / "overlays").exists()
    job = json.loads((done / "job" / "logged.json").read_text())["run_id"]  # the id that the job prints
    for number, named in enumerate((job, str(done / "job"))):
        assert predict(named, data / "testA", tmp_path / f"job{number}", *more) == 0
        same = read_coco(tmp_path / f"job{number}" / "predictions.json")
        assert same["annotations"] == again["annotations"]


def test_what_cannot_be_predicted_is_one_line(done: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    detector, data = str(done / "job" / "cells" / "encoder-seed0" / "detector"), done / "job" / "data"
    (tmp_path / "none").mkdir()
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.png", "a.bmp"):
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(twice / name)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "a.png").write_bytes(b"no image")
    store = ("--tracking.root", str(done / "store"))
    cases: list[tuple[str, Path, tuple[str, ...], str]] = [
        (detector, tmp_path / "nowhere", (), "no folder there"),
        (detector, tmp_path / "none", (), "no image in it"),
        (detector, twice, (), "a.png: a.bmp has the same name; keep one of the two"),
        (detector, bad, (), "a.png: "),
        (str(tmp_path), data / "testA", (), "no detector here; give a folder of one"),
        ("fffffff0", data / "testA", store, "no run in"),
        (detector, data / "testA", ("--truth", str(data / "train.json")), "give the COCO file of these very images"),
        (detector, data / "testA", ("--min_score", "1.5"), "min_score is 1.5"),
    ]
    for named, images, more, message in cases:
        assert predict(named, images, tmp_path / "out", *more) == 2, message
        error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error")]
        assert len(error) == 1 and message in error[0], error
        assert not (tmp_path / "out").exists()
