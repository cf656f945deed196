"""Annotated images for training: order, flips and detector targets.

Legend: N instances of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ca2cl.detection.coco.files import align_categories, decode_mask, read_coco
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.errors import InputError, LocalError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers

T = TypeVar("T")
GIVE_MASK = "give it one, or use --head retinanet_fpn, which needs none"
_FLIP = 1  # of a Philox key: flips draw from another stream than the order


class Example(NamedTuple):
    """One image as torchvision's detectors take it."""

    pixels: Tensor
    """RGB from 0 to 1, float32 (3, H, W)."""
    target: dict[str, Tensor]
    """``boxes`` (N, 4), edges as in ``Detections``; ``labels`` (N,), from 0; ``masks`` uint8 (N, H, W)."""


@dataclass(frozen=True)
class ImageStep:
    """This rank's images of one optimizer step (``training.loop.StepData``)."""

    step: int
    """From 0."""
    epoch: int
    examples: list[Example]
    bad: list[Any] = field(default_factory=list)
    """None: an image that does not decode ends the training."""

    @property
    def micro_batches(self) -> list[ImageStep]:
        """One, of all images."""
        return [self]


@dataclass(frozen=True)
class ImageOrder:
    """The endless order of ``count`` images: one permutation by (seed, epoch) after another, cut into batches.

    Which image stands where, and whether it is flipped, does not depend on processes or on where a run goes on.
    """

    count: int
    batch_size: int
    seed: int

    def places(self, step: int) -> range:
        """Places of the images of optimizer step ``step``, from 0, in the endless order."""
        return range(step * self.batch_size, (step + 1) * self.batch_size)

    def image(self, place: int) -> tuple[int, bool]:
        """Number of the image at a place, and whether it is flipped there."""
        epoch, number = divmod(place, self.count)
        shown = int(np.argsort(self._words(epoch), kind="stable")[number])
        return shown, bool(self._words(epoch, _FLIP)[shown] & 1)

    def _words(self, epoch: int, stream: int = 0) -> npt.NDArray[np.uint64]:
        return np.random.Philox(key=np.array([2 * self.seed + stream, epoch], np.uint64)).random_raw(self.count)


def draw_word(*numbers: int) -> int:
    """A seed for a generator, from the numbers that identify a draw."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def annotated_classes(split: CocoSplit, data: Json, use: str, *, masks: bool) -> set[str]:
    """Names of the classes that have instances.

    Args:
        split: for messages.
        data: its COCO file.
        use: for messages, such as "to train on".
        masks: whether every annotation must have one.

    Raises:
        InputError: no instance, or one without a mask.
    """
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = {names[row["category_id"]] for row in data["annotations"] if _is_instance(row)}
    if not found:
        raise InputError(f"{split.annotations}: has no instance {use}; annotate it, or give another split")
    bare = next((row for row in data["annotations"] if masks and "segmentation" not in row), None)
    if bare is not None:
        raise InputError(f"{split.annotations}: annotation {bare.get('id')!r} has no segmentation; {GIVE_MASK}")
    return found


class AnnotatedImages(Dataset[T | str]):
    """Training examples by place in the order; a subclass makes one of an image and its annotations.

    Images without an instance are left out, as detectron2 does: there is nothing to find in them. A fault of an image
    comes as text, for a worker's exception would reach the user as a page of traceback.

    Args:
        split: with at least one instance.
        classes: names by category; an instance's label is its category's place here, from 0.
        batch_size, seed: as ``ImageOrder`` takes them.
        masks: whether every instance must have one.

    Raises:
        InputError: no instance, one without a mask, or one of another class.
    """

    def __init__(self, split: CocoSplit, classes: Sequence[str], batch_size: int, seed: int, *, masks: bool) -> None:
        data = align_categories(read_coco(split.annotations), classes, split.annotations)
        annotated_classes(split, data, "to train on", masks=masks)
        self.split, self.masks = split, masks
        labels = {category["id"]: label for label, category in enumerate(data["categories"])}
        self.rows: dict[Any, list[Json]] = defaultdict(list)
        """Annotations by their image's id, each with its ``label``."""
        for row in filter(_is_instance, data["annotations"]):
            self.rows[row["image_id"]].append({**row, "label": labels[row["category_id"]]})
        self.images: list[Json] = [image for image in data["images"] if image["id"] in self.rows]
        self.order = ImageOrder(len(self.images), batch_size, seed)

    def __getitem__(self, place: int) -> T | str:
        number, flipped = self.order.image(place)
        try:
            return self.example(self.images[number], place, flipped)
        except InputError as error:
            return str(error)

    @abstractmethod
    def example(self, image: Json, place: int, flipped: bool) -> T:
        """The example for an image at a place of the order.

        Raises:
            InputError: the image cannot be read.
        """


class TrainingImages(AnnotatedImages[Example]):
    """Examples for torchvision's detectors."""

    def example(self, image: Json, place: int, flipped: bool) -> Example:
        """Pixels and target, flipped or not."""
        pixels = torch.from_numpy(self.split.read(image)).permute(2, 0, 1).contiguous().float() / 255
        rows = self.rows[image["id"]]
        boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
        boxes_N4[:, 2:] += boxes_N4[:, :2]
        target = {"boxes": boxes_N4, "labels": torch.tensor([row["label"] for row in rows])}
        if self.masks:
            masks = [decode_mask(row["segmentation"], image["height"], image["width"]) for row in rows]
            target["masks"] = torch.from_numpy(np.stack(masks).astype(np.uint8))
        return _flipped(pixels, target) if flipped else Example(pixels, target)


def _is_instance(row: Json) -> bool:
    """False for crowds and boxes without area, which no detector is trained on."""
    return not row["iscrowd"] and min(row["bbox"][2:]) > 0


def _flipped(pixels: Tensor, target: dict[str, Tensor]) -> Example:
    """Left and right changed."""
    left, top, right, bottom = target["boxes"].unbind(1)
    width = pixels.shape[2]
    mirrored = {**target, "boxes": torch.stack([width - right, top, width - left, bottom], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return Example(pixels.flip(2), mirrored)


def image_steps(
    images: TrainingImages, steps: range, *, rank: int, world: int, workers: int, device: torch.device
) -> Iterator[ImageStep]:
    """This rank's share of the batches of ``steps``, on ``device``.

    Args:
        images: training images with their order.
        steps: optimizer steps, from 0.
        rank: of this process.
        world: processes.
        workers: reading processes.
        device: where the images go.
    """
    from accelerate.utils import send_to_device

    pin = device.type == "cuda"
    batches = read_batches(images, steps, rank=rank, world=world, workers=workers, pin=pin)
    for step, examples in zip(steps, batches, strict=True):
        moved = send_to_device(examples, device, non_blocking=True)
        yield ImageStep(step, images.order.places(step)[0] // images.order.count, moved)


def read_batches(
    images: AnnotatedImages[T], steps: range, *, rank: int, world: int, workers: int, pin: bool
) -> Iterator[list[T]]:
    """This rank's share of the batches of ``steps``: every W-th image.

    Args:
        images: training images with their order.
        steps: optimizer steps, from 0.
        rank: this process.
        world: processes.
        workers: decoding processes.
        pin: whether to give pinned memory.

    Raises:
        InputError: ``batch_size`` is not a multiple of the number of processes: the losses are means over a process's
            images, and images of a smaller share would weigh more.
        LocalError: an image cannot be read.
    """
    batch_size = images.order.batch_size
    if batch_size % world:
        raise InputError(
            f"batch_size is {batch_size}, on {world} processes: use a multiple of {world}, or another number of "
            "processes"
        )
    loader = DataLoader(
        images,
        sampler=[place for step in steps for place in images.order.places(step)[rank::world]],
        batch_size=batch_size // world,
        num_workers=workers if workers and processes_can_share() else 0,
        worker_init_fn=partial(begin_worker, outlives_sigterm=True),
        collate_fn=list,
        pin_memory=pin,
        generator=torch.Generator(),  # its workers' seeds; else drawn from the global one when the first batch is read
    )
    with starting_workers():
        batches = iter(loader)
    for examples in batches:
        problem = next((one for one in examples if isinstance(one, str)), None)
        if problem:
            raise LocalError(problem)
        yield examples
