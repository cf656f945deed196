"""The detectron2 engine on bodies that detectron2 has none of: levels, training, saving, refusals.

None of it runs without detectron2: ``pytest -m detectron2`` where it is installed (docs/detection.md)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ca2cl.detection.engines.detectron2 import Detectron2Engine
from ca2cl.detection.engines.registry import load_detector
from ca2cl.detection.engines.torchvision import TorchvisionEngine
from ca2cl.errors import InputError
from ca2cl.models.batch_norm import BatchNorm
from tests.jobs.detection.test_bodies import ADAMW, CONVNEXT, EFFICIENTNET, SCHEDULE, VIT, Watch, make_job

pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize("head", ["mask_rcnn_fpn", "retinanet_fpn"])
@pytest.mark.parametrize("arch", [VIT, CONVNEXT, EFFICIENTNET])
def test_levels_are_those_of_engine_torchvision(tmp_path: Path, arch: str, head: Any) -> None:
    job = make_job(tmp_path, arch, SCHEDULE, head)
    network = Detectron2Engine().build(job).network.eval()
    other = TorchvisionEngine().build(job).network.eval().model.backbone
    other.load_state_dict(network.backbone.pyramid.state_dict(), strict=True)
    encoder = job.encoder.encoder.state_dict()
    assert all(torch.equal(value, encoder[name]) for name, value in other.body.state_dict().items())
    pixels = torch.randint(0, 256, (3, 50, 90), generator=torch.Generator().manual_seed(0)).float()
    with torch.no_grad():
        images = network.preprocess_image([{"image": pixels}]).tensor
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in (job.encoder.card.mean, job.encoder.card.std))
        assert images.shape == (1, 3, 64, 96)
        torch.testing.assert_close(images[0, :, :50, :90], (pixels / 255 - mean) / std, rtol=1e-5, atol=1e-5)
        found, wanted = network.backbone(images), other(images)
    first = 2 if head == "mask_rcnn_fpn" else 3
    assert list(found) == [f"p{number}" for number in range(first, first + 5)]
    for one, level in zip(found.values(), wanted.values(), strict=True):
        torch.testing.assert_close(one, level, rtol=0, atol=0)
    for name, shape in network.backbone.output_shape().items():
        assert found[name].shape[-1] == -(-96 // shape.stride) and shape.channels == 256


@pytest.mark.parametrize(
    ("arch", "head", "schedule"),
    [
        (EFFICIENTNET, "mask_rcnn_fpn", replace(SCHEDULE, batch_size=2, precise_norm=True)),
        (VIT, "mask_rcnn_fpn", ADAMW),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path: Path, arch: str, head: Any, schedule: Any) -> None:
    engine, job = Detectron2Engine(), make_job(tmp_path, arch, replace(schedule, iterations=3), head)
    whole = engine.build(job)
    body = whole.network.backbone.pyramid.body
    layers = {name: one for name, one in body.named_modules() if isinstance(one, BatchNorm)}
    before = {name: value.clone() for name, value in body.state_dict().items()}
    assert whole.train(Watch())
    numbers = body.layers(coarse=True)
    frozen = {name.removeprefix("body.") for name, number in numbers.items() if number < 2}
    for name, value in body.state_dict().items():
        if name in frozen:
            assert torch.equal(value, before[name]), name
    for name, layer in layers.items():  # the statistics are of the training images now, but for the frozen ones
        changed = not torch.equal(layer.running_mean, before[f"{name.removeprefix('body.')}.running_mean"])  # type: ignore[arg-type]
        assert changed == (layer.norm != "frozen") or name == "body.bn2", name
    for path in job.folder.iterdir():
        path.unlink()
    assert not engine.build(job).train(first := Watch(stop_after=1))
    resumed = engine.build(job)
    assert resumed.train(again := Watch()) and len(first.losses) + len(again.losses) == 3
    expected = whole.network.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.network.state_dict().items())
    resumed.save(tmp_path / "saved")
    assert "build_ca2cl_backbone" in (tmp_path / "saved" / "detectron2.yaml").read_text()
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    (one,), (other,) = (list(d.predict([image])) for d in (resumed, load_detector(tmp_path / "saved", "cpu")))
    np.testing.assert_allclose(one.boxes_N4, other.boxes_N4, rtol=1e-4, atol=1e-3)


def test_what_detectron2_cannot_do_is_one_line(tmp_path: Path) -> None:
    engine = Detectron2Engine()
    with pytest.raises(InputError, match="head is 'mask_rcnn_c4': detectron2 has it for resnet18, .*use mask_rcnn_fpn"):
        engine.build(make_job(tmp_path / "vit", VIT, SCHEDULE, "mask_rcnn_c4"))
    for schedule in (replace(SCHEDULE, optimizer="adamw"), replace(SCHEDULE, layer_decay=0.8)):
        with pytest.raises(InputError, match="engine detectron2 trains a resnet18 by sgd at one rate; .*torchvision"):
            engine.build(make_job(tmp_path / str(schedule.layer_decay), "resnet18", schedule))
