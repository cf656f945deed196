"""Detector engine on torchvision's detectors and this package's loop.

Runs on one process or several under accelerate.

Losses are means over a process's own images and proposals, as torchvision and detectron2 make them, and proposals are
drawn at random: on another number of processes a training is another draw, not the same one. A resumed one is the same.

Legend: N detections of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor

from ca2cl.data.decode import Pixels
from ca2cl.detection.coco.files import encode_mask
from ca2cl.detection.engines.base import Detector, Engine, TrainJob, Watch
from ca2cl.detection.engines.checkpoint import DetectorCard
from ca2cl.detection.engines.data import ImageStep, TrainingImages, draw_word, image_steps
from ca2cl.detection.engines.predictions import Detections
from ca2cl.detection.engines.settings import Schedule, has_masks
from ca2cl.detection.engines.torchvision_model import HEADS, DetectionNetwork, build_network
from ca2cl.detection.network.body import load_body
from ca2cl.detection.network.optimizer import detector_optimizer
from ca2cl.models.batch_norm import BatchNorm, commit_statistics
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training import loop
from ca2cl.training.checkpoint import Checkpointer, restore
from ca2cl.training.engine import AccelerateEngine

_OF_TILES = ("step", "samples", "bad_samples")
"""Fields of the loop's records that are not in a detector's journal."""


class TorchvisionEngine(Engine):
    """torchvision's Mask R-CNN and RetinaNet (``Engine``)."""

    name = "torchvision"
    heads = HEADS

    @property
    def version(self) -> str:
        """torchvision's."""
        return str(torchvision.__version__)

    def _detector(self, card: DetectorCard, device: str, job: TrainJob | None = None) -> TorchvisionDetector:
        if job is None:
            return TorchvisionDetector(card, build_network(card).to(device))
        network = build_network(card, job.schedule.train_sides, job.schedule.frozen_stages)
        load_body(network.body, job.encoder.encoder.state_dict(), job.encoder.uri)
        return TorchvisionDetector(card, network, job)


class TorchvisionDetector(Detector):
    """One detector of torchvision's (``Detector``)."""

    network: DetectionNetwork

    @property
    def model(self) -> Any:
        """torchvision's own detector."""
        return self.network.model

    def _train(self, job: TrainJob, watch: Watch) -> bool:
        schedule = job.schedule
        images = TrainingImages(job.train, job.classes, schedule.batch_size, schedule.seed, masks=has_masks(job.head))
        accelerator = build_accelerator()
        optimizer = detector_optimizer(schedule.optim, self.network, self.network.body)
        engine = AccelerateEngine(accelerator, self.network, optimizer, schedule.precision)

        def steps(those: range) -> Iterator[ImageStep]:
            ranks = {"rank": accelerator.process_index, "world": accelerator.num_processes}
            return image_steps(images, those, **ranks, workers=job.workers, device=engine.device)

        checkpointer = Checkpointer(job.folder, keep_last=1)
        progress = loop.Progress()
        if (newest := checkpointer.latest()) is not None:
            restore(newest, engine)
            progress = loop.Progress.of(newest)
        observer = _Observer(watch, self, schedule, steps)
        whole = loop.TrainJob(
            engine=engine,
            method=_Losses(schedule.seed),
            data=steps(range(progress.step, schedule.iterations)),
            observer=observer,
            checkpointer=checkpointer,
            stop=watch.stop,
            batch_size=schedule.batch_size,
            checkpoint_every=schedule.checkpoint_every,
            rate=partial(learning_rate, schedule),
            total_steps=schedule.iterations,
            steps_per_epoch=schedule.evaluate_every or schedule.iterations + 1,
            check_bad=lambda bad, seen, tiles: None,
        )
        finished = progress.step >= schedule.iterations or loop.train(whole, progress)
        if finished:
            observer.make_precise()
        accelerator.free_memory()
        return finished

    def _find(self, pixels_HWC: Pixels) -> Detections:
        device = next(self.network.parameters()).device
        (found,) = self.network([torch.from_numpy(pixels_HWC).permute(2, 0, 1).to(device).float() / 255])
        masks = None
        if "masks" in found:
            masks = [encode_mask(mask_1HW[0].cpu().numpy() > 0.5) for mask_1HW in found["masks"]]
        return Detections(
            found["boxes"].float().cpu().numpy(),
            found["scores"].float().cpu().numpy(),
            found["labels"].cpu().numpy(),
            masks,
        )


def learning_rate(schedule: Schedule, step: int) -> float:
    """The rate of optimizer step number ``step`` (from 0): a linear rise over ``warmup`` steps, its last one reaching
    ``lr``, then a tenth after every milestone (Goyal et al., arXiv 1706.02677, sections 2.2 and 5.1)."""
    if step < schedule.warmup:
        return schedule.lr * (step + 1) / schedule.warmup
    return schedule.lr * 0.1 ** sum(step >= milestone for milestone in schedule.milestones)


class _Losses(loop.Method):
    """The sum of torchvision's losses."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def step(self, engine: AccelerateEngine, micro_batches: Sequence[ImageStep]) -> dict[str, Tensor]:
        """Accumulate the gradient of the mean over ranks; returns the losses, averaged over ranks."""
        (batch,) = micro_batches
        accelerator = engine.accelerator
        # torchvision draws sizes and proposals from torch's generator: a run that goes on must draw the same ones
        torch.manual_seed(draw_word(self.seed, batch.step, accelerator.process_index))
        with engine.micro_step(last=True):
            losses = engine.network([one.pixels for one in batch.examples], [one.target for one in batch.examples])
            loss = torch.stack(list(losses.values())).sum()
            engine.backward(loss / accelerator.num_processes)
        commit_statistics(engine.bare)
        values = torch.stack([loss, *losses.values()]).detach().float()
        return dict(zip(["loss", *losses], accelerator.reduce(values, reduction="mean"), strict=True))


class _Observer:
    """Passes on to the job's ``Watch`` what the loop reports (``training.loop.Observer``)."""

    def __init__(
        self,
        watch: Watch,
        detector: TorchvisionDetector,
        schedule: Schedule,
        steps: Callable[[range], Iterator[ImageStep]],
    ) -> None:
        self.watch, self.detector, self.schedule, self.steps = watch, detector, schedule, steps
        self.step = 0

    def log_step(self, record: dict[str, Any]) -> None:
        """Every rank's, for ``Watch.on_step``."""
        self.step = record["step"]
        values = {name: value for name, value in record.items() if name not in _OF_TILES}
        values["images_per_s"] = values.pop("tiles_per_s")
        self.watch.on_step(self.step, values)

    def log_bad(self, step: int, tiles: Sequence[Any]) -> None:
        """An image that does not decode ends the training instead."""

    def after_epoch(self, epoch: int, engine: AccelerateEngine) -> bool:
        """Time to evaluate, unless the training ends here: then the job does so by itself."""
        if self.step < self.schedule.iterations:
            self.make_precise()
            self.watch.on_evaluation(self.step, self.detector)
        return False

    def make_precise(self) -> None:
        """Estimate the running statistics anew, where the schedule has it. Every rank calls it."""
        if self.schedule.precise_steps:
            torch.manual_seed(self.schedule.seed)
            precise_statistics(self.detector.network, self.steps(range(self.schedule.precise_steps)))


@torch.no_grad()
def precise_statistics(network: DetectionNetwork, steps: Iterable[ImageStep]) -> None:
    """Set BatchNorm's running statistics to their mean over the batches of ``steps``, with the weights held (Wu and
    Johnson, arXiv 2105.07576, section 3). Every rank calls it."""
    layers = [layer for layer in network.modules() if isinstance(layer, BatchNorm)]
    if not layers:
        return
    momenta, training = [layer.momentum for layer in layers], network.training
    network.train()
    for step in steps:
        network.record([example.pixels for example in step.examples])
    for layer in layers:
        layer.momentum = 1.0
    commit_statistics(network)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    network.train(training)
