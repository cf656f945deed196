"""Detector engine on detectron2, for one process or several.

Why that launcher and not detectron2's: a process group is there already, made in one way for every verb, with Slurm's
or a cloud's rendezvous; detectron2's starts processes of its own on every machine and knows neither.

Order and augmentation of images, and what is drawn in a step, are functions of seed, place and rank, so a training that
goes on is the one that was stopped. Losses are means over a process's own images: on another number of processes a
training is another draw.

Legend: H, W an image's height and width in pixels.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ca2cl.common.files import write_atomic
from ca2cl.common.optional import need
from ca2cl.common.records import parse_json
from ca2cl.detection.coco.files import encode_mask
from ca2cl.detection.engines.base import Detector, Engine, Head, Pixels, Trained, TrainJob, Watch
from ca2cl.detection.engines.checkpoint import KEPT, DetectorCard, fill, read_card, read_weights, write_detector
from ca2cl.detection.engines.detectron2_weights import RECIPE
from ca2cl.detection.engines.predictions import Detections
from ca2cl.errors import InputError
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.launched import under_deepspeed

if TYPE_CHECKING:
    from detectron2.config import CfgNode

HEADS: tuple[Head, ...] = ("mask_rcnn_fpn", "mask_rcnn_c4", "retinanet_fpn")
CONFIG = "detectron2.yaml"


class Detectron2Engine(Engine):
    """detectron2's Mask R-CNN and RetinaNet (``Engine``).

    Raises:
        MissingPackage: detectron2 is not installed; the message says how to get it.
    """

    name = "detectron2"
    heads = HEADS

    def __init__(self) -> None:
        _hush()
        need("detectron2.engine", RECIPE)

    @property
    def version(self) -> str:
        """Of the package, with the commit where pip knows it."""
        held = metadata.distribution("detectron2")
        source = parse_json(held.read_text("direct_url.json") or "{}")
        commit = source.get("vcs_info", {}).get("commit_id", "")
        return held.version + (f" ({commit[:12]})" if commit else "")

    def build(self, job: TrainJob) -> Detectron2Detector:
        """As ``Engine.build``."""
        from ca2cl.detection.engines.detectron2_model import configuration, load_body

        schedule, encoder = job.schedule, job.encoder.card
        _refuse(job)
        card = DetectorCard(
            head=job.head, arch=encoder.arch, classes=tuple(job.classes), mean=encoder.mean, std=encoder.std,
            test_side=schedule.test_side, longest_side=schedule.longest_side,
            norm="sync" if schedule.sync_norm else "frozen", engine=self.name, engine_version=self.version,
        )  # fmt: skip
        cfg = configuration(card, job.device, schedule, build_accelerator().num_processes)
        torch.manual_seed(schedule.seed)
        network = _network(cfg)
        load_body(network, job.encoder.encoder.state_dict(), job.encoder.uri)
        return Detectron2Detector(card, cfg, network, job)

    def load(self, folder: Path, device: str = "cpu") -> Detectron2Detector:
        """As ``Engine.load``."""
        from ca2cl.detection.engines.detectron2_model import configuration

        card = read_card(folder)
        if card.engine != self.name:
            raise InputError(f"{folder}: a detector of engine {card.engine}; load it with that")
        cfg = configuration(card, device)
        network = _network(cfg)
        fill(network, read_weights(folder), folder)
        return Detectron2Detector(card, cfg, network.eval())


def _hush() -> None:
    """Leave out what detectron2 has torch warn of: nobody who runs a training can do anything about it."""
    for message in (
        "`torch.jit.script` is deprecated",
        "torch.meshgrid: in an upcoming release",
        "The given NumPy array",
    ):
        warnings.filterwarnings("ignore", message=message)
    for loud in ("torch.fx._symbolic_trace", "fvcore.common.config"):  # the latter, of detectron2's own configurations
        logging.getLogger(loud).setLevel(logging.ERROR)


def _refuse(job: TrainJob) -> None:
    precision, on_gpu = job.schedule.precision, torch.device(job.device).type == "cuda"
    if under_deepspeed():
        raise InputError("detect does not run under DeepSpeed: detectors are small; use a DDP configuration")
    if precision == "bf16":
        raise InputError("precision is bf16: detectron2's trainer has fp16; use that, no, or engine torchvision")
    if precision == "fp16" and not on_gpu:
        raise InputError("precision is fp16: detectron2 has it on GPUs only; use no")


def _network(cfg: CfgNode) -> nn.Module:
    from ca2cl.detection.engines.detectron2_model import build_network

    return build_network(cfg)


class Detectron2Detector(Detector):
    """One detector of detectron2's (``Detector``); ``job`` is what it is trained from, None of one to predict with."""

    def __init__(self, card: DetectorCard, cfg: CfgNode, network: nn.Module, job: TrainJob | None = None) -> None:
        self.card, self.cfg, self.network, self.job = card, cfg, network, job

    @property
    def classes(self) -> Sequence[str]:
        """As ``Detector.classes``."""
        return self.card.classes

    def train(self, watch: Watch) -> Trained:
        """As ``Detector.train``."""
        from ca2cl.detection.engines.detectron2_training import Training

        if self.job is None:
            raise InputError("this detector was loaded to predict with: build one to train")
        return Training(self.cfg, self.network, self.job, self).run(watch)

    @torch.no_grad()
    def predict(self, images: Iterable[Pixels]) -> Iterator[Detections]:
        """As ``Detector.predict``."""
        from detectron2.data.transforms import ResizeShortestEdge

        resize = ResizeShortestEdge([self.card.test_side] * 2, self.card.longest_side)
        training = self.network.training
        self.network.eval()
        try:
            for pixels_HWC in images:
                resized_HWC = resize.get_transform(pixels_HWC).apply_image(pixels_HWC)
                image = torch.from_numpy(np.ascontiguousarray(resized_HWC.transpose(2, 0, 1))).float()
                height, width = pixels_HWC.shape[:2]
                (found,) = self.network([{"image": image, "height": height, "width": width}])
                yield _detections(found["instances"])
        finally:
            self.network.train(training)

    def save(self, folder: Path) -> None:
        """As ``Detector.save``; and ``detectron2.yaml``, the whole configuration, for detectron2's own tools."""
        write_detector(folder, self.card, self.network.state_dict())
        write_atomic(folder / CONFIG, self.cfg.dump().encode(), KEPT)


def _detections(found: Any) -> Detections:
    found = found.to("cpu")
    masks = None
    if found.has("pred_masks"):
        masks = [encode_mask(mask_HW) for mask_HW in found.pred_masks.numpy()]
    return Detections(
        found.pred_boxes.tensor.float().numpy(), found.scores.float().numpy(), found.pred_classes.numpy(), masks
    )
