"""The detectron2 engine with the real package: features, tensors, schedule, a stop and another start, two processes.

None of it runs without detectron2: ``pytest -m detectron2`` where it is installed (docs/detection.md)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.detection.coco.files import decode_mask, read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.engines.base import CocoSplit, Detector, TrainJob
from ca2cl.detection.engines.detectron2 import HEADS, Detectron2Detector, Detectron2Engine
from ca2cl.detection.engines.detectron2_weights import load_backbone
from ca2cl.detection.engines.registry import find_engine, load_detector
from ca2cl.detection.engines.settings import Schedule
from ca2cl.detection.engines.torchvision import learning_rate
from ca2cl.detection.prepare.config import PrepareConfig
from ca2cl.detection.prepare.run import run as run_prepare
from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.runtime.signals import StopFlag
from tests.support.gland_images import write_glands
from tests.support.glands import write_pairs
from tests.support.jobs import LAUNCH, start
from tests.support.pickles import Bait
from tests.support.ports import free_port

pytestmark = pytest.mark.detectron2
SCHEDULE = Schedule(
    iterations=3, batch_size=2, lr=0.02, warmup=2, milestones=(2,), train_sides=(48, 64), test_side=64, longest_side=96,
)  # fmt: skip
DEPTHS = {"resnet18": 122 - 20 - 2, "resnet34": 218 - 36 - 2, "resnet50": 320 - 53 - 2}
"""Tensors of torchvision's ResNet, less BatchNorm's counters and the classifier's two."""


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> CocoSplit:
    folder = tmp_path_factory.mktemp("glands")
    write_pairs(folder / "in" / "train", ["a", "b", "c"])
    assert run_prepare(PrepareConfig(dataset="masks", source=str(folder / "in"), out=str(folder / "out"))) == 0
    return CocoSplit.of(folder / "out", "train")


def encoder_of(arch: str) -> ResolvedEncoder:
    """A new encoder whose BatchNorm statistics and weights are not those of a new one."""
    torch.manual_seed(5)
    encoder, generator = build_encoder(arch), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in encoder.state_dict().items():
            if name.endswith(("running_mean", "bias")):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
            elif name.endswith("running_var") or value.ndim == 1:
                value.copy_((0.5 if "running" in name else 0.2) + 0.5 * torch.rand(value.shape, generator=generator))
    mean, std = (0.7, 0.5, 0.68), (0.2, 0.25, 0.18)
    card = EncoderCard(arch=arch, feature_dim=encoder.feature_dim, input_size=64, mean=mean, std=std)
    return ResolvedEncoder(encoder.eval(), card, uri=f"test:{arch}", source_run_id=None)


def make_job(split: CocoSplit, folder: Path, schedule: Schedule = SCHEDULE, **more: Any) -> TrainJob:
    encoder, head = encoder_of(more.pop("arch", "resnet18")), more.pop("head", "mask_rcnn_fpn")
    return TrainJob(head, encoder, split, ("gland",), schedule, folder, **more)


class Watch:
    """Keeps what it is told, and raises the stop flag after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop, self.stop_after = StopFlag(), stop_after
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.evaluated: list[int] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, dict(values)))
        self.stop.raised |= step == self.stop_after

    def on_evaluation(self, step: int, detector: Detector) -> None:
        assert isinstance(detector, Detectron2Detector)
        list(detector.predict([np.zeros((40, 50, 3), np.uint8)]))
        assert detector.network.training
        self.evaluated.append(step)


@pytest.mark.parametrize("arch", list(DEPTHS))
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sync", [True, False])
def test_the_backbone_has_every_tensor_and_the_encoders_features(
    split: CocoSplit, tmp_path: Path, arch: str, head: Any, sync: bool
) -> None:
    from ca2cl.detection.engines.detectron2_model import load_body

    job = make_job(split, tmp_path, replace(SCHEDULE, sync_norm=sync), arch=arch, head=head)
    detector = Detectron2Engine().build(job)
    network, encoder = detector.network.eval(), job.encoder.encoder
    state = encoder.state_dict()
    filled = load_body(network, state, "again")
    assert len(filled) == DEPTHS[arch]
    mine = [name for name in network.state_dict() if name.startswith("backbone.") and ".bottom_up." in name]
    if head != "mask_rcnn_c4":
        assert sorted(name for name in mine if "num_batches_tracked" not in name) == filled
    pixels = torch.randint(0, 256, (3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        images = network.preprocess_image([{"image": pixels}]).tensor
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (job.encoder.card.mean, job.encoder.card.std))
        x = ((pixels / 255 - mean) / std)[None]
        torch.testing.assert_close(images, x, rtol=1e-5, atol=1e-5)
        h = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
        stages = {}
        for number in (1, 2, 3, 4):
            h = stages[f"res{number + 1}"] = getattr(encoder, f"layer{number}")(h)
        body = network.backbone if head == "mask_rcnn_c4" else network.backbone.bottom_up
        found = body(images)
        if head == "mask_rcnn_c4":  # the rest of the body is the head's, on regions; here on the whole image
            found["res5"] = network.roi_heads.res5[:-1](found["res4"])
        for name, features in found.items():
            torch.testing.assert_close(features, stages[name], rtol=1e-4, atol=1e-4)
    assert "res5" in found and len(found) == {"mask_rcnn_fpn": 4, "mask_rcnn_c4": 2, "retinanet_fpn": 3}[head]
    short = {name: value for name, value in state.items() if name != "layer4.1.bn2.bias"}
    more = {**state, "layer5.0.conv1.weight": state["conv1.weight"]}
    other = {**state, "conv1.weight": state["conv1.weight"][:, :, 1:]}
    cases = (
        (short, "not in the encoder: res5.1.conv2.norm.bias"),
        (more, "without a place: res6.0.conv1.weight"),
        (other, "of another shape: stem.conv1.weight"),
        ({}, "not in the encoder"),
    )
    for wrong, told in cases:
        with pytest.raises(InputError, match=f"does not fill the detector's backbone exactly .*{told}"):
            load_body(network, wrong, "test")


@pytest.mark.parametrize("head", HEADS)
def test_a_stopped_training_goes_on_to_the_same_weights(split: CocoSplit, tmp_path: Path, head: Any) -> None:
    engine = Detectron2Engine()
    schedule = replace(SCHEDULE, iterations=4, evaluate_every=2, frozen_stages=2, precise_norm=True)
    whole, watch = engine.build(make_job(split, tmp_path / "whole", schedule, head=head)), Watch()
    before = {name: value.clone() for name, value in whole.network.state_dict().items()}
    assert whole.train(watch)
    assert [step for step, _ in watch.steps] == [1, 2, 3, 4] and watch.evaluated == [2]
    for step, values in watch.steps:
        parts = [value for name, value in values.items() if name.startswith("loss_")]
        assert len(parts) == (2 if head == "retinanet_fpn" else 5)
        assert values["loss"] == pytest.approx(sum(parts), rel=1e-5) and values["data_wait_s"] >= 0
        assert values["lr"] == pytest.approx(learning_rate(schedule, step - 1))
    assert watch.steps[-1][1]["images_per_s"] > 0
    after = whole.network.state_dict()
    still = {name for name, value in before.items() if torch.equal(value, after[name])}
    frozen = {name for name in before if ".stem." in name or ".res2." in name}
    moved = {name for name in before if name.endswith(("res3.0.conv1.weight", "res4.0.conv1.weight"))}
    assert frozen <= still and len(moved) == 2 and not moved & still

    stopped = engine.build(make_job(split, tmp_path / "parts", schedule, head=head))
    assert not stopped.train(first := Watch(stop_after=2))
    done = len(first.steps)
    assert done in (2, 3)  # ranks agree once a step
    resumed, watch = engine.build(make_job(split, tmp_path / "parts", schedule, head=head, workers=1)), Watch()
    assert resumed.train(watch)
    assert [step for step, _ in watch.steps] == list(range(done + 1, 5))
    for name, value in resumed.network.state_dict().items():
        if head == "retinanet_fpn":  # its loss is compiled by torch.jit, which rounds otherwise once it is warm
            torch.testing.assert_close(value, after[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(value, after[name]), name
    assert len(list((tmp_path / "parts").glob("*.pth"))) == 1
    assert engine.build(make_job(split, tmp_path / "parts", schedule, head=head)).train(ended := Watch())
    assert not ended.steps


@pytest.mark.parametrize(("head", "sync"), [("mask_rcnn_fpn", True), ("mask_rcnn_c4", False), ("retinanet_fpn", True)])
def test_a_saved_detector_predicts_as_before(split: CocoSplit, tmp_path: Path, head: Any, sync: bool) -> None:
    detector = Detectron2Engine().build(make_job(split, tmp_path, replace(SCHEDULE, sync_norm=sync), head=head))
    with torch.no_grad():  # a new RetinaNet is sure of nothing (Lin et al., arXiv 1708.02002): it would find nothing
        for name, parameter in detector.network.named_parameters():
            if name.endswith("cls_score.bias"):
                parameter.zero_()
    images = [np.random.default_rng(size).integers(0, 256, (size, 70, 3), np.uint8) for size in (50, 64)]
    found = list(detector.predict(images))
    assert sum(map(len, found)) > 0
    detector.save(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        "detector.safetensors", "detector.json", "detectron2.yaml",
    }  # fmt: skip
    again = load_detector(tmp_path / "saved", "cpu")
    assert isinstance(again, Detectron2Detector) and again.card == detector.card
    assert again.card.engine_version.startswith("0.6")
    for image, one, other in zip(images, found, again.predict(images), strict=True):
        np.testing.assert_array_equal(one.boxes_N4, other.boxes_N4)
        np.testing.assert_array_equal(one.scores_N, other.scores_N)
        assert one.masks_N == other.masks_N and set(one.labels_N.tolist()) <= {0}
        assert (one.boxes_N4[:, 2] <= 70).all() and (one.boxes_N4[:, 3] <= len(image)).all()
        assert (one.masks_N is None) == (head == "retinanet_fpn")
        for code in one.masks_N or ():
            assert decode_mask(code, *image.shape[:2]).shape == image.shape[:2]
    with pytest.raises(InputError, match="loaded to predict with"):
        again.train(Watch())


def test_what_does_not_fit_is_one_line(split: CocoSplit, tmp_path: Path) -> None:
    engine = Detectron2Engine()
    for precision, told in (("bf16", "detectron2's trainer has fp16"), ("fp16", "on GPUs only")):
        with pytest.raises(InputError, match=f"precision is {precision}: .*{told}"):
            engine.build(make_job(split, tmp_path, replace(SCHEDULE, precision=precision)))
    huge = engine.build(make_job(split, tmp_path / "huge", replace(SCHEDULE, lr=1e30, warmup=0)))
    with pytest.raises(InputError, match=r"step [23]: .*use a lower lr"):
        huge.train(Watch())
    (tmp_path / "images").mkdir()
    for path in split.images.iterdir():
        Image.fromarray(np.zeros((60, 81, 3), np.uint8)).save(tmp_path / "images" / path.name)
    changed = CocoSplit(split.annotations, tmp_path / "images")
    with pytest.raises(InputError, match=r"\.png: .*make the folder again"):
        engine.build(make_job(changed, tmp_path / "changed")).train(Watch())
    assert find_engine("auto").name == find_engine("detectron2").name == "detectron2"


SMALL = (
    "--encoder", "random:3", "--dataset", "glas", "--iterations", "2", "--lr", "0.01", "--train_sides", "48", "64",
    "--test_side", "64", "--workers", "0", "--precise_norm", "true", "--evaluate_every", "1", "--against", "[]",
)  # fmt: skip


def test_a_job_by_either_engine_and_never_by_both(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    glas = write_glands(tmp_path / "in", 3, 2, 80, 100, suffix=".png")
    where = ("--data", str(glas), "--output_dir", str(tmp_path / "job"), "--tracking.root", str(tmp_path / "store"))
    small = ("detect", *SMALL, "--batch_size", "1", *where)
    assert main([*small]) == 0
    told = capfd.readouterr()
    assert (
        "engine detectron2 0.6" in told.out and "AP box" in told.out and "detectron2 is not installed" not in told.err
    )
    found = json.loads((tmp_path / "job" / "detect-results.json").read_text())
    assert found["made_by"]["engine"] == found["config"]["engine"] == "detectron2"
    assert main([*small]) == 0 and "already" in capfd.readouterr().out
    assert main([*small, "--engine", "torchvision"]) == 2
    assert "holds another job (engine " in capfd.readouterr().err
    cell = tmp_path / "job" / "cells" / "encoder-seed0"
    out = tmp_path / "predicted"
    arguments = [str(cell / "detector"), str(tmp_path / "job" / "data" / "testA"), str(out), "--device", "cpu"]
    assert main(["detect", "predict", *arguments, "--truth", str(tmp_path / "job" / "data" / "testA.json")]) == 0
    scores = read_coco(out / "predictions.json")["info"]["scores"]
    assert scores["box/AP"] == pytest.approx(found["trainings"][0]["scores"]["testA"]["box/AP"])


def test_two_processes_train_and_score_together(tmp_path: Path) -> None:
    glas = write_glands(tmp_path / "in", 3, 2, 80, 100, suffix=".png")
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    verb = ["-m", "ca2cl", "detect", *SMALL, "--data", str(glas), "--output_dir", "job", "--batch_size", "2"]
    ended: subprocess.CompletedProcess[str] = start([*launch, *verb], tmp_path)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "job" / "detect-results.json").read_text())
    (training,) = found["trainings"]
    assert training["engine"] == "detectron2" and training["steps"] == 2 and ended.stdout.count("AP box") == 1
    rows = json.loads((tmp_path / "job" / "cells" / "encoder-seed0" / "predictions" / "testA.json").read_text())
    scores = {name: value for name, value in training["scores"]["testA"].items() if "/" in name}
    assert coco_scores(read_coco(tmp_path / "job" / "data" / "testA.json"), rows) == pytest.approx(scores)


def test_no_file_of_a_job_is_run(split: CocoSplit, tmp_path: Path) -> None:
    """detectron2 itself unpickles what ``last_checkpoint`` names, and builds what a configuration's tags say."""
    bait = Bait(tmp_path)
    folder = tmp_path / "job"
    training = Detectron2Engine().build(make_job(split, folder))
    folder.mkdir(exist_ok=True)
    for name, form in (
        ("x.pkl", "pickle"),
        ("model_1.pkl", "pickle"),
        ("model_1.pth", "torch_zip"),
        ("model_1.pth", "pickle"),
    ):
        (folder / name).write_bytes(bait.forms[form])
        (tmp_path / name).write_bytes(bait.forms[form])
        for told in (name, f"../{name}", str(tmp_path / name)):
            (folder / "last_checkpoint").write_text(told)
            with pytest.raises(InputError, match="is none; delete it|damaged"):
                training.train(Watch())
            assert not bait.sprung
    (tmp_path / "x.yaml").write_bytes(bait.yaml)
    with pytest.raises(Exception, match="constructor"):
        load_backbone(tmp_path / "model_1.pth", tmp_path / "x.yaml")
    assert not bait.sprung
