"""The torchvision engine: order and flips, the body's tensors, schedule, a stop and another start, saving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ca2cl.detection.coco.files import decode_mask
from ca2cl.detection.engines.base import CocoSplit, Detector, TrainJob
from ca2cl.detection.engines.data import ImageOrder, ImageStep, TrainingImages, image_steps
from ca2cl.detection.engines.settings import Schedule
from ca2cl.detection.engines.torchvision import (
    TorchvisionDetector,
    TorchvisionEngine,
    learning_rate,
    precise_statistics,
)
from ca2cl.detection.network.body import load_body
from ca2cl.detection.prepare.config import PrepareConfig
from ca2cl.detection.prepare.run import run as run_prepare
from ca2cl.errors import InputError
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.runtime.signals import StopFlag
from tests.support.glands import write_pairs

CPU = torch.device("cpu")
SCHEDULE = Schedule(
    iterations=3, batch_size=2, lr=0.02, warmup=2, milestones=(2,), train_sides=(48, 64), test_side=64, longest_side=96,
)  # fmt: skip


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> CocoSplit:
    folder = tmp_path_factory.mktemp("glands")
    write_pairs(folder / "in" / "train", ["a", "b", "c"])
    empty = folder / "in" / "train" / "masks" / "d.png"
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(empty)
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(folder / "in" / "train" / "images" / "d.png")
    assert run_prepare(PrepareConfig(dataset="masks", source=str(folder / "in"), out=str(folder / "out"))) == 0
    return CocoSplit.of(folder / "out", "train")


def make_job(split: CocoSplit, folder: Path, schedule: Schedule = SCHEDULE, **more: Any) -> TrainJob:
    encoder = resolve_encoder("random:5")
    head = more.pop("head", "mask_rcnn_fpn")
    return TrainJob(head, encoder, split, ("gland",), schedule, folder, **more)


class Watch:
    """Keeps what it is told, and raises the stop flag after a step."""

    def __init__(self, stop_after: int = 0) -> None:
        self.stop, self.stop_after = StopFlag(), stop_after
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.evaluated: list[tuple[int, int]] = []

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append((step, dict(values)))
        self.stop.raised |= step == self.stop_after

    def on_evaluation(self, step: int, detector: Detector) -> None:
        assert isinstance(detector, TorchvisionDetector)
        (found,) = detector.predict([np.zeros((40, 50, 3), np.uint8)])
        assert detector.network.training
        self.evaluated.append((step, len(found)))


@given(count=st.integers(1, 40), batch=st.integers(1, 12), seed=st.integers(0, 2**31 - 1))
def test_every_pass_shows_every_image_once_on_any_number_of_processes(count: int, batch: int, seed: int) -> None:
    order = ImageOrder(count, batch, seed)
    steps = -(-3 * count // batch)
    seen = [order.image(place) for step in range(steps) for place in order.places(step)]
    for epoch in range(3):
        assert sorted(image for image, _ in seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count > 20:
        first, second = ([image for image, _ in seen[e * count : (e + 1) * count]] for e in (0, 1))
        assert first != second
        flips = Counter(flip for _, flip in seen)
        assert min(flips[True], flips[False]) > len(seen) / 5


def test_ranks_share_a_batch_and_an_epoch_may_end_inside_one(split: CocoSplit) -> None:
    images = TrainingImages(split, ("gland",), 2, seed=3, masks=True)
    assert len(images.images) == 3  # the one without a gland is left out
    whole = list(image_steps(images, range(4), rank=0, world=1, workers=0, device=CPU))
    halves = [list(image_steps(images, range(4), rank=rank, world=2, workers=0, device=CPU)) for rank in (0, 1)]
    assert [step.epoch for step in whole] == [0, 0, 1, 2]
    for step, *shares in zip(whole, *halves, strict=True):
        together = [share.examples[0] for share in shares]
        for one, other in zip(step.examples, together, strict=True):
            torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=0)
            torch.testing.assert_close(one.target, other.target, rtol=0, atol=0)
    with pytest.raises(InputError, match="batch_size is 2, on 3 processes: use a multiple of 3"):
        next(image_steps(images, range(1), rank=0, world=3, workers=0, device=CPU))


def test_boxes_are_around_their_masks_flipped_or_not(split: CocoSplit) -> None:
    images = TrainingImages(split, ("gland",), 2, seed=0, masks=True)
    flips = Counter[bool]()
    for place in range(12):
        example = images[place]
        assert not isinstance(example, str)
        _, flipped = images.order.image(place)
        flips[flipped] += 1
        for box, mask in zip(example.target["boxes"], example.target["masks"], strict=True):
            rows, columns = np.nonzero(mask.numpy())
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        hole = example.target["masks"][0][20, 59 if flipped else 20]
        assert hole == 0 and example.target["labels"].tolist() == [0, 0, 0, 0]
    assert flips[True] and flips[False]


def test_the_rate_rises_and_falls_at_milestones() -> None:
    schedule = replace(SCHEDULE, iterations=10, warmup=4, milestones=(6, 8), lr=0.8)
    rates = [learning_rate(schedule, step) for step in range(10)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008])


def test_the_body_is_the_encoder(split: CocoSplit, tmp_path: Path) -> None:
    job = make_job(split, tmp_path)
    detector = TorchvisionEngine().build(job)
    body, encoder = detector.network.eval().model.backbone.body, job.encoder.encoder
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        levels = body.maps(x)
        h = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(x))))
        for number, stage in enumerate((encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)):
            h = stage(h)
            torch.testing.assert_close(levels[number], h, rtol=0, atol=0)
    state = dict(encoder.state_dict())
    assert set(body.state_dict()) == set(state)
    for wrong in ({k: v for k, v in state.items() if k != "layer4.1.bn2.bias"}, {**state, "layer5.weight": x}):
        with pytest.raises(InputError, match="does not fill the detector's backbone exactly"):
            load_body(detector.network.body, wrong, "random:5")


def test_a_stopped_training_goes_on_to_the_same_weights(split: CocoSplit, tmp_path: Path) -> None:
    engine, schedule = TorchvisionEngine(), replace(SCHEDULE, batch_size=1, evaluate_every=2, frozen_stages=2)
    whole, watch = engine.build(make_job(split, tmp_path / "whole", schedule)), Watch()
    before = {name: value.clone() for name, value in whole.network.model.backbone.body.state_dict().items()}
    assert whole.train(watch)
    assert [step for step, _ in watch.steps] == [1, 2, 3] and [step for step, _ in watch.evaluated] == [2]
    parts = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    for step, values in watch.steps:
        assert values["loss"] == pytest.approx(sum(values[name] for name in parts), rel=1e-5)
        assert values["lr"] == pytest.approx(learning_rate(schedule, step - 1)) and values["images_per_s"] > 0
    after = whole.network.model.backbone.body.state_dict()
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith(("conv1", "bn1", "layer1"))}

    assert not engine.build(make_job(split, tmp_path / "parts", schedule)).train(stopped := Watch(stop_after=1))
    resumed = engine.build(make_job(split, tmp_path / "parts", schedule))
    assert resumed.train(again := Watch())
    assert [[step for step, _ in one.steps] for one in (stopped, again)] == [[1], [2, 3]]
    expected = whole.network.state_dict()
    for name, value in resumed.network.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("head", "sync"), [("mask_rcnn_fpn", True), ("retinanet_fpn", True), ("retinanet_fpn", False)])
def test_a_saved_detector_predicts_as_before(split: CocoSplit, tmp_path: Path, head: Any, sync: bool) -> None:
    engine = TorchvisionEngine()
    detector = engine.build(make_job(split, tmp_path / "job", replace(SCHEDULE, sync_norm=sync), head=head))
    with torch.no_grad():  # a new RetinaNet is sure of nothing (Lin et al., arXiv 1708.02002): it would find nothing
        for name, parameter in detector.network.model.named_parameters():
            if name.endswith("cls_logits.bias"):
                parameter.zero_()
    images = [np.random.default_rng(size).integers(0, 256, (size, 70, 3), np.uint8) for size in (50, 64)]
    found = list(detector.predict(images))
    assert sum(map(len, found)) > 0
    detector.save(tmp_path / "saved")
    again = engine.load(tmp_path / "saved")
    assert again.card == detector.card
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


def test_what_is_no_detector_is_refused(split: CocoSplit, tmp_path: Path) -> None:
    engine = TorchvisionEngine()
    with pytest.raises(InputError, match="no detector here"):
        engine.load(tmp_path)
    detector = engine.build(make_job(split, tmp_path / "job"))
    detector.save(tmp_path / "saved")
    card = tmp_path / "saved" / "detector.json"
    card.write_text(card.read_text().replace('"torchvision"', '"detectron2"'))
    with pytest.raises(InputError, match="a detector of engine detectron2"):
        engine.load(tmp_path / "saved")
    with pytest.raises(InputError, match="head is 'mask_rcnn_c4': the engine torchvision has"):
        engine.build(make_job(split, tmp_path / "c4", head="mask_rcnn_c4"))
    with pytest.raises(InputError, match="frozen_stages is 6: use 0 to 5"):
        engine.build(make_job(split, tmp_path / "frozen", replace(SCHEDULE, frozen_stages=6)))


def test_an_image_that_changed_is_one_line(split: CocoSplit, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for path in split.images.iterdir():
        Image.fromarray(np.zeros((60, 81, 3), np.uint8)).save(tmp_path / "images" / path.name)
    changed = CocoSplit(split.annotations, tmp_path / "images")
    images = TrainingImages(changed, ("gland",), 2, seed=0, masks=True)
    with pytest.raises(InputError, match=r"\.png: .*60 x 80.*make the folder again|\.png: .*make the folder again"):
        next(image_steps(images, range(1), rank=0, world=1, workers=0, device=CPU))
    with pytest.raises(InputError, match="has the classes gland, not cell"):
        TrainingImages(split, ("cell",), 2, seed=0, masks=True)


def test_precise_statistics_are_the_mean_over_batches(split: CocoSplit, tmp_path: Path) -> None:
    detector = TorchvisionEngine().build(make_job(split, tmp_path, replace(SCHEDULE, train_sides=(64,))))
    network = detector.network
    images = TrainingImages(split, ("gland",), 2, seed=1, masks=False)
    steps = list(image_steps(images, range(3), rank=0, world=1, workers=0, device=CPU))
    means, variances = [], []
    with torch.no_grad():
        for step in steps:
            batch = [example.pixels for example in step.examples]
            x = network.model.train().transform(batch)[0].tensors
            out = network.model.backbone.body.conv1(x).double()
            means.append(out.mean((0, 2, 3)))
            variances.append(out.var((0, 2, 3)))
    precise_statistics(network, steps)
    layer = network.model.backbone.body.bn1
    assert isinstance(layer, BatchNorm) and layer.momentum == 0.1
    assert layer.running_mean is not None and layer.running_var is not None
    torch.testing.assert_close(layer.running_mean.double(), torch.stack(means).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), torch.stack(variances).mean(0), rtol=1e-4, atol=1e-6)
    assert isinstance(steps[0], ImageStep) and steps[0].micro_batches == [steps[0]]
