"""Detector engines: their base classes, and the data they train on.

The job knows COCO files, encoders, seeds, MLflow and metrics; an engine knows how to build, train and run a detector.
They meet here, and nowhere else:

    job                                              engine
    resolve_encoder, detect prepare   ── build ──→   detector = body from the encoder + heads, every tensor consumed
    Watch: journal, MLflow, signals   ←─ train ──→   its own loop: batches, augmentation, SyncBN, AMP, DDP, checkpoints
    coco_scores, glas_scores          ←─ predict ─   boxes, scores, masks in the image's own pixels
    MLflow's model                    ←─ save ────   a folder of safetensors and JSON; load gives the detector back

Why the cut is where it is. detectron2 has a trainer with hooks, a checkpointer and a launcher of its own, and they are
to be used, not imitated: so ``train`` is one call, and what the job must know or decide comes to it through ``Watch``.
A torchvision engine calls it from a plain loop, a detectron2 engine from one ``HookBase``
(``on_step`` in ``after_step``, ``on_evaluation`` every ``evaluate_every`` steps, ``stop`` looked at there too).
Evaluation is the job's: engines predict, and one piece of code scores all of them, or two engines' numbers could not
stand in one table. Data goes in as COCO files and not as a loader, because each engine has a mapper of its own. Masks
come out as run lengths of the whole image, and not as the 28 x 28 that a head makes: pasting is the engine's.

Who does what:

- **Processes.** Every process of the job calls ``build`` and ``train`` with the same arguments; the process group is
  there already. Engines split the work and reduce what they report; ``Watch`` is called on every rank in the same
  order. Its stop flag is a rank's own: the engine has the ranks agree on it before it acts, for a flag that one rank
  alone saw would leave the others waiting.
- **Checkpoints.** In ``TrainJob.folder``, by the engine, atomically, every ``checkpoint_every`` steps and on a stop; a
  ``train`` that finds some goes on from the newest.
- **Randomness.** A function of ``Schedule.seed``: order, augmentation and the heads' initial values.
- **Numbers.** ``Schedule`` is in iterations and images, global over processes; an engine that would have to scale a
  value (``batch_size`` that the processes do not divide) refuses it.
- **Records.** ``Engine.name`` and ``Engine.version`` go into every result; results of two engines are never averaged.

Legend: N detections of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import nn

from ca2cl.data.decode import BadSample, Pixels, decode
from ca2cl.data.sources.names import is_clutter
from ca2cl.detection.engines.checkpoint import DetectorCard, load_weights, read_card, write_detector
from ca2cl.detection.engines.detectron2_weights import RECIPE
from ca2cl.detection.engines.predictions import Detections
from ca2cl.detection.engines.settings import EngineName, Head, Schedule
from ca2cl.detection.network.body import check_body
from ca2cl.errors import InputError, LocalError
from ca2cl.models.backbone import check_trusted

if TYPE_CHECKING:
    from ca2cl.registry.resolve import ResolvedEncoder
    from ca2cl.runtime.signals import StopFlag

REMEDY = "make the folder again with `ca2cl detect prepare`"


@dataclass(frozen=True)
class CocoSplit:
    """One split as ``ca2cl detect prepare`` writes it, or any other COCO file of instances."""

    annotations: Path
    images: Path
    """The folder that ``file_name`` is relative to."""

    @classmethod
    def of(cls, root: Path, split: str) -> CocoSplit:
        """Split ``split`` of a folder that ``ca2cl detect prepare`` wrote.

        Raises:
            InputError: it is not there.
        """
        found = cls(root / f"{split}.json", root / split)
        if not found.annotations.is_file() or not found.images.is_dir():
            there = ", ".join(split_names(root)) or "none"
            raise InputError(f"{root}: no split {split}, there are: {there}; make it with `ca2cl detect prepare`")
        return found

    def path(self, image: Mapping[str, Any]) -> Path:
        """Where an image of the split lies. A ``file_name`` from Windows has backslashes, and umlauts may be written in
        another form than on this disk."""
        name = str(image["file_name"])
        names = [name, name.replace("\\", "/"), unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name)]
        return next((path for path in (self.images / one for one in names) if path.exists()), self.images / name)

    def read(self, image: Mapping[str, Any]) -> Pixels:
        """The pixels of an image of the split.

        Raises:
            LocalError: it cannot be read, or is not of the size in the annotations.
        """
        path = self.path(image)
        try:
            return decode(path.read_bytes(), expect=(image["height"], image["width"]))
        except (OSError, BadSample) as error:
            raise LocalError(f"{path}: {getattr(error, 'strerror', None) or error}; {REMEDY}") from None


def split_names(root: Path) -> list[str]:
    """The splits of a folder that ``ca2cl detect prepare`` wrote, by name."""
    return sorted(path.stem for path in root.glob("*.json") if not is_clutter(path.name))


@dataclass(frozen=True)
class TrainJob:
    """Input of an engine: encoder, data and schedule of one training."""

    head: Head
    encoder: ResolvedEncoder
    """The body's weights, and in its card the architecture and the mean and std of its input."""
    train: CocoSplit
    classes: Sequence[str]
    """Names of the categories, in the order that ``train`` lists them; ``Detections.labels_N`` counts from 0 in it."""
    schedule: Schedule
    folder: Path
    """Where checkpoints lie; another start with the same one goes on."""
    device: str = "cpu"
    workers: int = 0
    """Processes that read and decode images, for each training process; 0 does so in the training process."""


class Watch(Protocol):
    """The job's side of a training: gets reports, and may stop it. Called on every rank alike."""

    stop: StopFlag
    """Raised by a signal, perhaps on one rank alone: the engine then writes a checkpoint and returns."""

    def on_step(self, step: int, values: Mapping[str, float]) -> None:
        """After optimizer step ``step`` (from 1): ``loss``, the losses that it is the sum of by the engine's names,
        averaged over ranks, ``lr``, and what else the engine measures."""

    def on_evaluation(self, step: int, detector: Detector) -> None:
        """Time to evaluate: ``detector`` predicts with the weights of this step. Not called for the last step."""


class Detector(ABC):
    """A detector of one engine; built or loaded by its ``Engine``.

    Args:
        card: what is saved beside the weights.
        network: what is trained; finds objects in eval mode.
        job: what it is trained from; None: it only predicts.
    """

    network: Any

    def __init__(self, card: DetectorCard, network: nn.Module, job: TrainJob | None = None) -> None:
        self.card, self.network, self.job = card, network, job

    @property
    def classes(self) -> Sequence[str]:
        """Names by label."""
        return self.card.classes

    @property
    def model(self) -> Any:
        """The part of the network whose tensors are saved."""
        return self.network

    def train(self, watch: Watch) -> bool:
        """Train to the end of the schedule, or until ``watch.stop`` is raised.

        Returns:
            False after a stop: the same job, started again, goes on.

        Raises:
            InputError: the data do not fit, a loss that is not finite, or the detector was loaded for predicting.
        """
        if self.job is None:
            raise InputError("this detector was loaded to predict with: build one to train")
        return self._train(self.job, watch)

    @abstractmethod
    def _train(self, job: TrainJob, watch: Watch) -> bool: ...

    @torch.no_grad()
    def predict(self, images: Iterable[Pixels]) -> Iterator[Detections]:
        """Yield the detections of each image, in order; weights and mode are as before afterwards.

        Args:
            images: RGB, uint8 (H, W, 3), of any sizes; resized to ``Schedule.test_side``.
        """
        training = self.network.training
        self.network.eval()
        try:
            yield from map(self._find, images)
        finally:
            self.network.train(training)

    @abstractmethod
    def _find(self, pixels_HWC: Pixels) -> Detections: ...

    def save(self, folder: Path) -> None:
        """Write what ``Engine.load`` needs into a folder that does not exist yet: safetensors and JSON, no pickle."""
        write_detector(folder, self.card, self.model.state_dict())


class Engine(ABC):
    """A way to train detectors."""

    name: ClassVar[EngineName]
    """torchvision or detectron2: the value of ``--engine``, recorded in every result."""
    heads: ClassVar[tuple[Head, ...]]
    """Those it can build."""

    @property
    @abstractmethod
    def version(self) -> str:
        """Of the package behind it, with the commit where it was built from one."""

    def check_head(self, head: Head) -> None:
        """Refuse a head that the engine does not have.

        Raises:
            InputError: it has not.
        """
        if head not in self.heads:
            other = f"; {RECIPE}" if self.name == "torchvision" else ""
            raise InputError(f"head is {head!r}: the engine {self.name} has {', '.join(self.heads)}{other}")

    def check_encoder(self, encoder: ResolvedEncoder, head: Head, schedule: Schedule) -> None:
        """Refuse an encoder that the engine cannot build this detector on.

        Raises:
            InputError: it cannot, or not with this schedule.
        """
        check_body(encoder.encoder, schedule.frozen_stages)
        if schedule.layer_decay is not None:
            encoder.encoder.layers()

    def build(self, job: TrainJob) -> Detector:
        """A detector whose body has the encoder's weights.

        Raises:
            InputError: a backbone tensor of the encoder that the body did not take, or one of the body's that the
                encoder did not give; a head or a setting that the engine does not have.
        """
        self.check_head(job.head)
        self.check_encoder(job.encoder, job.head, job.schedule)
        schedule, encoder = job.schedule, job.encoder.card
        card = DetectorCard(
            head=job.head, arch=encoder.arch, classes=tuple(job.classes), mean=encoder.mean, std=encoder.std,
            test_side=schedule.test_side, longest_side=schedule.longest_side, input_size=encoder.input_size,
            norm="sync" if schedule.sync_norm else "frozen", engine=self.name, engine_version=self.version,
        )  # fmt: skip
        torch.manual_seed(schedule.seed)
        return self._detector(card, job.device, job)

    def load(self, folder: Path, device: str = "cpu") -> Detector:
        """A detector that ``Detector.save`` wrote, to predict with.

        Raises:
            InputError: nothing there, damaged, another engine's, or on a body of code that the user does not trust.
        """
        card = read_card(folder)
        if card.engine != self.name:
            raise InputError(f"{folder}: a detector of engine {card.engine}; load it with that")
        check_trusted(card.arch, str(folder))
        detector = self._detector(card, device)
        load_weights(folder, detector.model)
        return detector

    @abstractmethod
    def _detector(self, card: DetectorCard, device: str, job: TrainJob | None = None) -> Detector:
        """A detector with new weights; with a job its body has the encoder's."""


def record_of(engine: Engine, job: TrainJob) -> dict[str, Any]:
    """Settings and versions of a result: only results in which all of them agree may be averaged."""
    schedule = {name: value for name, value in vars(job.schedule).items() if name != "seed"}
    return {"engine": engine.name, "engine_version": engine.version, "head": job.head, **schedule}
