"""``ca2cl detect`` on bodies that are no ResNets: a job, another start, predictions without the encoder, refusals."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ca2cl.cli import main
from ca2cl.detection.coco.files import read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.engines.base import CocoSplit, Detector, TrainJob
from ca2cl.detection.engines.predictions import coco_results
from ca2cl.detection.engines.settings import Schedule
from ca2cl.detection.engines.torchvision import TorchvisionEngine
from ca2cl.detection.prepare.config import PrepareConfig
from ca2cl.detection.prepare.run import run as run_prepare
from ca2cl.errors import InputError
from ca2cl.models.backbone import Backbone, build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.resolve import ResolvedEncoder, resolve_encoder
from ca2cl.runtime.signals import StopFlag
from tests.support.coco_files import coco, write_split
from tests.support.gland_images import write_glands
from tests.support.jobs import LAUNCH, start
from tests.support.ports import free_port

VIT, CONVNEXT, EFFICIENTNET = "timm:test_vit", "timm:test_convnext", "timm:test_efficientnet"
SWIN = "timm:swin_tiny_patch4_window7_224,embed_dim=24,window_size=4"
VIT14 = "timm:vit_tiny_patch16_224,patch_size=14,depth=2"
SIDES = ("--train_sides", "48", "64", "--test_side", "64", "--workers", "0")
SCHEDULE = Schedule(
    iterations=2, batch_size=1, lr=0.01, warmup=0, milestones=(), train_sides=(48, 64), test_side=64, longest_side=96,
    frozen_stages=2,
)  # fmt: skip
ADAMW = replace(SCHEDULE, optimizer="adamw", lr=1e-3, layer_decay=0.8)


class Bare(Backbone):
    """Somebody's own body, without maps."""

    arch, feature_dim = "some.module:bare", 3


def write_encoder(folder: Path, arch: str, side: int = 64) -> Path:
    torch.manual_seed(2)
    encoder = build_encoder(arch, image_size=side)
    card = EncoderCard(
        arch=arch, feature_dim=encoder.feature_dim, input_size=side, mean=(0.7, 0.5, 0.6), std=(0.2, 0.25, 0.2)
    )
    return save_encoder(folder, encoder.state_dict(), card)


def make_job(folder: Path, arch: str, schedule: Schedule, head: Any = "mask_rcnn_fpn") -> TrainJob:
    encoder = resolve_encoder(str(write_encoder(folder / "encoder", arch, 56 if arch == VIT14 else 64)))
    split = write_split(folder / "data", "train", coco())
    return TrainJob(head, encoder, split, ("gland", "nerve"), schedule, folder / "checkpoints")


class Watch:
    """Raises the stop flag after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop, self.stop_after, self.losses = StopFlag(), stop_after, list[float]()

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.losses.append(values["loss"])
        self.stop.raised |= step == self.stop_after

    def on_evaluation(self, step: int, detector: Detector) -> None: ...


def detect(encoder: Path | str, glas: Path, folder: Path, *more: str) -> int:
    where = ("--data", str(glas), "--output_dir", str(folder / "job"), "--tracking.root", str(folder / "store"))
    job = ("--engine", "torchvision", "--encoder", str(encoder), "--dataset", "glas", "--against", "[]", *SIDES)
    return main(["detect", *job, *where, *more])


@pytest.mark.slow
def test_a_detector_on_a_vit_predicts_without_its_encoder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = write_encoder(tmp_path / "encoder", VIT)
    glas = write_glands(tmp_path / "in", 2, 1, 60, 80, suffix=".png")
    assert detect(encoder, glas, tmp_path, "--iterations", "1", "--batch_size", "1", "--frozen_stages", "2") == 0
    capfd.readouterr()
    result = json.loads((tmp_path / "job" / "detect-results.json").read_text())
    assert result["encoder"]["card"]["arch"] == VIT
    assert (result["config"]["optimizer"], result["config"]["lr"]) == ("adamw", 1e-4)
    (training,) = result["trainings"]
    folder = tmp_path / "job" / "cells" / "encoder-seed0" / "detector"
    card = json.loads((folder / "detector.json").read_text())
    assert (card["arch"], card["input_size"], card["mean"]) == (VIT, 64, [0.7, 0.5, 0.6])
    shutil.rmtree(encoder)
    data, out = tmp_path / "job" / "data", tmp_path / "predicted"
    arguments = [str(folder), str(data / "testA"), str(out), "--truth", str(data / "testA.json"), "--device", "cpu"]
    assert main(["detect", "predict", *arguments]) == 0
    scores = read_coco(out / "predictions.json")["info"]["scores"]
    assert scores == pytest.approx(training["scores"]["testA"])
    card["arch"] = "somewhere.bodies:build"  # a file that somebody sent
    (folder / "detector.json").write_text(json.dumps(card))
    assert main(["detect", "predict", *arguments[:2], str(tmp_path / "again")]) == 2
    assert "somewhere.bodies:build, which is code outside ca2cl" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "head", "schedule"),
    [
        (EFFICIENTNET, "mask_rcnn_fpn", replace(SCHEDULE, batch_size=2)),
        (CONVNEXT, "retinanet_fpn", ADAMW),
        (SWIN, "mask_rcnn_fpn", ADAMW),
        (VIT14, "retinanet_fpn", replace(ADAMW, sync_norm=False)),
        ("timm:test_resnet", "retinanet_fpn", replace(SCHEDULE, sync_norm=False)),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_weights(
    tmp_path: Path, arch: str, head: Any, schedule: Schedule
) -> None:
    engine, job = TorchvisionEngine(), make_job(tmp_path, arch, schedule, head)
    whole, before = engine.build(job), job.encoder.encoder.state_dict()
    assert whole.train(Watch())
    body = whole.network.body.state_dict()
    numbers = job.encoder.encoder.layers(coarse=True)
    frozen = {name.removeprefix("body.") for name, number in numbers.items() if number < 2}
    assert frozen and all(torch.equal(body[name], before[name]) for name in frozen)
    moved = [name for name in body if "num_batches" not in name and not torch.equal(body[name], before[name])]
    assert len(moved) > len(body) / 4
    shutil.rmtree(job.folder)
    assert not engine.build(job).train(Watch(stop_after=1))
    resumed = engine.build(job)
    assert resumed.train(again := Watch()) and len(again.losses) == 1
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())
    resumed.save(tmp_path / "saved")
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    (one,), (other,) = (list(d.predict([image])) for d in (resumed, engine.load(tmp_path / "saved")))
    np.testing.assert_allclose(one.boxes_N4, other.boxes_N4, rtol=1e-4, atol=1e-3)


def test_what_cannot_be_a_body_leaves_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = write_encoder(tmp_path / "encoder", VIT)
    glas = write_glands(tmp_path / "in", 1, 1, 60, 80, suffix=".png")
    for more, told in (
        (("--frozen_stages", "9"), "frozen_stages is 9: use 0 to 7, the stem and 6 stages of timm:test_vit"),
        (("--layer_decay", "2"), "layer_decay is 2.0: use"),
        (("--head", "mask_rcnn_c4"), "head is 'mask_rcnn_c4': the engine torchvision has"),
    ):
        assert detect(encoder, glas, tmp_path, *more) == 2
        assert told in capfd.readouterr().err
    assert not (tmp_path / "job").exists()
    found = resolve_encoder(str(encoder))
    bare = ResolvedEncoder(Bare(), replace(found.card, arch=Bare.arch), None, "here")
    with pytest.raises(InputError, match="detect is not for some.module:bare: it has no feature maps"):
        TorchvisionEngine().check_encoder(bare, "mask_rcnn_fpn", SCHEDULE)


@pytest.mark.slow
def test_two_processes_train_a_body_whose_last_layers_no_map_needs(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder", EFFICIENTNET)
    glas = write_glands(tmp_path / "in", 2, 1, 60, 80, suffix=".png")
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--main_process_port", str(free_port())]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    verb = ["-m", "ca2cl", "detect", "--engine", "torchvision", "--encoder", str(encoder), "--dataset", "glas", *SIDES]
    verb += ["--data", str(glas), "--output_dir", "job", "--batch_size", "2", "--iterations", "2", "--against", "[]"]
    ended: subprocess.CompletedProcess[str] = start([*launch, *verb], tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("AP box") == 1


@pytest.mark.slow
@pytest.mark.parametrize("arch", [VIT, CONVNEXT, EFFICIENTNET])
def test_a_detector_learns_a_few_images(tmp_path: Path, arch: str) -> None:
    write_glands(tmp_path / "glas", 2, 0, 96, 128, suffix=".png")
    data = tmp_path / "data"
    assert run_prepare(PrepareConfig(dataset="glas", source=str(tmp_path / "glas"), out=str(data))) == 0
    sides: dict[str, Any] = {"train_sides": (96,), "test_side": 96, "longest_side": 128}
    schedule = Schedule(iterations=80, batch_size=2, lr=0.01, warmup=10, milestones=(65,), **sides)
    if arch != EFFICIENTNET:
        schedule = replace(schedule, optimizer="adamw", lr=5e-4, weight_decay=0.05)
    encoder = resolve_encoder(str(write_encoder(tmp_path / "encoder", arch, 96)))
    split = CocoSplit.of(data, "train")
    job = TrainJob("mask_rcnn_fpn", encoder, split, ("gland",), schedule, tmp_path / "checkpoints")
    detector, watch = TorchvisionEngine().build(job), Watch()
    detector.network.model.roi_heads.fg_bg_sampler.batch_size_per_image = 32  # of 512, for masks take most of a step
    assert detector.train(watch)
    assert np.mean(watch.losses[-10:]) < 0.5 * np.mean(watch.losses[:10])
    truth = read_coco(split.annotations)
    rows = []
    for image in truth["images"]:
        (found,) = detector.predict([split.read(image)])
        rows += coco_results(image["id"], found, [truth["categories"][0]["id"]])
    scores = coco_scores(truth, rows)
    assert scores["box/AP50"] > 0.1 and scores["mask/AP50"] > 0.1, (scores, watch.losses[:: len(watch.losses) // 6])
