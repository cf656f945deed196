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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from ca2cl.common.files import write_atomic
from ca2cl.common.optional import need
from ca2cl.common.records import parse_json
from ca2cl.data.decode import Pixels
from ca2cl.detection.coco.files import encode_mask
from ca2cl.detection.engines.base import Detector, Engine, TrainJob, Watch
from ca2cl.detection.engines.checkpoint import KEPT, DetectorCard
from ca2cl.detection.engines.detectron2_weights import RECIPE
from ca2cl.detection.engines.predictions import Detections
from ca2cl.detection.engines.settings import Head, Schedule
from ca2cl.detection.network.body import load_body
from ca2cl.errors import InputError
from ca2cl.models.resnet import ARCHITECTURES

if TYPE_CHECKING:
    from detectron2.config import CfgNode

    from ca2cl.registry.resolve import ResolvedEncoder

HEADS: tuple[Head, ...] = ("mask_rcnn_fpn", "mask_rcnn_c4", "retinanet_fpn")
CONFIG = "detectron2.yaml"
_WARNINGS = (
    "`torch.jit.script` is deprecated", "torch.meshgrid: in an upcoming release", "The given NumPy array",
)  # fmt: skip


class Detectron2Engine(Engine):
    """detectron2's Mask R-CNN and RetinaNet (``Engine``).

    Raises:
        MissingPackage: detectron2 is not installed; the message says how to get it.
    """

    name = "detectron2"
    heads = HEADS

    def __init__(self) -> None:
        # what detectron2 has torch warn of and what it logs of its own configurations: no user can do anything about it
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for loud in ("torch.fx._symbolic_trace", "fvcore.common.config"):
            logging.getLogger(loud).setLevel(logging.ERROR)
        # logs every exception of a training with its traceback, and then raises it: it is printed once, in one line
        logging.getLogger("detectron2.engine.train_loop").setLevel(logging.CRITICAL)
        need("detectron2.engine", RECIPE)

    @property
    def version(self) -> str:
        """Of the package, with the commit where pip knows it."""
        package = metadata.distribution("detectron2")
        source = parse_json(package.read_text("direct_url.json") or "{}")
        commit = source.get("vcs_info", {}).get("commit_id", "")
        return package.version + (f" ({commit[:12]})" if commit else "")

    def _detector(self, card: DetectorCard, device: str, job: TrainJob | None = None) -> Detectron2Detector:
        from detectron2.modeling import build_model

        from ca2cl.detection.engines import detectron2_model

        if job is None:
            cfg = detectron2_model.configuration(card, device)
            return Detectron2Detector(card, cfg, build_model(cfg))
        _check_precision(job)
        cfg = detectron2_model.configuration(card, device, job.schedule)
        network = build_model(cfg)
        state, uri = job.encoder.encoder.state_dict(), job.encoder.uri
        if card.arch in ARCHITECTURES:
            detectron2_model.load_body(network, state, uri)
        else:
            load_body(network.backbone.pyramid.body, state, uri)
        return Detectron2Detector(card, cfg, network, job)

    def check_encoder(self, encoder: ResolvedEncoder, head: Head, schedule: Schedule) -> None:
        """As ``Engine.check_encoder``."""
        super().check_encoder(encoder, head, schedule)
        arch = encoder.card.arch
        if arch not in ARCHITECTURES and head == "mask_rcnn_c4":
            raise InputError(
                f"head is {head!r}: detectron2 has it for {', '.join(ARCHITECTURES)}, not for {arch}; use mask_rcnn_fpn"
            )
        if arch in ARCHITECTURES and (schedule.optimizer != "sgd" or schedule.layer_decay is not None):
            raise InputError(
                f"optimizer is {schedule.optimizer!r}, layer_decay {schedule.layer_decay}: engine detectron2 trains a "
                f"{arch} by sgd at one rate; use these, or engine torchvision"
            )


def _check_precision(job: TrainJob) -> None:
    precision, on_gpu = job.schedule.precision, torch.device(job.device).type == "cuda"
    if precision == "bf16":
        raise InputError("precision is bf16: detectron2's trainer has fp16; use that, no, or engine torchvision")
    if precision == "fp16" and not on_gpu:
        raise InputError("precision is fp16: detectron2 has it on GPUs only; use no")


class Detectron2Detector(Detector):
    """One detector of detectron2's (``Detector``).

    Args:
        cfg: detectron2's configuration of it.
    """

    def __init__(self, card: DetectorCard, cfg: CfgNode, network: nn.Module, job: TrainJob | None = None) -> None:
        super().__init__(card, network, job)
        self.cfg = cfg

    def _train(self, job: TrainJob, watch: Watch) -> bool:
        from ca2cl.detection.engines.detectron2_training import Training

        return Training(self.cfg, job, self, watch).run()

    def _find(self, pixels_HWC: Pixels) -> Detections:
        from detectron2.data.transforms import ResizeShortestEdge

        resize = ResizeShortestEdge([self.card.test_side] * 2, self.card.longest_side)
        resized_HWC = resize.get_transform(pixels_HWC).apply_image(pixels_HWC)
        image = torch.from_numpy(np.ascontiguousarray(resized_HWC.transpose(2, 0, 1))).float()
        height, width = pixels_HWC.shape[:2]
        (output,) = self.network([{"image": image, "height": height, "width": width}])
        found = output["instances"].to("cpu")
        masks = None
        if found.has("pred_masks"):
            masks = [encode_mask(mask_HW) for mask_HW in found.pred_masks.numpy()]
        return Detections(
            found.pred_boxes.tensor.float().numpy(), found.scores.float().numpy(), found.pred_classes.numpy(), masks
        )

    def save(self, folder: Path) -> None:
        """As ``Detector.save``; and ``detectron2.yaml``, the whole configuration, for detectron2's own tools."""
        super().save(folder)
        write_atomic(folder / CONFIG, self.cfg.dump().encode(), KEPT)
