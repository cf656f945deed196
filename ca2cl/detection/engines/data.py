"""Annotated images for training: order, flips and detector targets.

Legend: N instances of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

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

from ca2cl.data.decode import BadSample, decode
from ca2cl.detection.coco.files import align_categories, decode_mask, read_coco
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit, Pixels
from ca2cl.errors import InputError, LocalError
from ca2cl.runtime.lifetime import begin_worker, processes_can_share, starting_workers

T = TypeVar("T")
REMEDY = "make the folder again with `ca2cl detect prepare`"
GIVE_MASK = "give it one, or use --head retinanet_fpn, which needs none"
_FLIP = 1  # of a Philox key: flips draw from another stream than the order


class Example(NamedTuple):
    """One image as torchvision's detectors take it."""

    pixels: Tensor
    """RGB from 0 to 1, float32 (3, H, W)."""
    target: dict[str, Tensor]
    """``boxes`` (N, 4), edges as in ``Detections``; ``labels`` (N,), from 0; ``masks`` uint8 (N, H, W)."""


class ImageBatch(NamedTuple):
    """This rank's images of an optimizer step."""

    step: int
    """From 0."""
    examples: list[Example]


@dataclass(frozen=True)
class ImageStep:
    """One optimizer step's share of this rank (``training.loop.StepData``)."""

    epoch: int
    micro_batches: list[ImageBatch]
    bad: list[Any] = field(default_factory=list)


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
    """A seed for a generator, from numbers that say what is drawn."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Annotated:
    """What a split has to train on: its images by number, and the instances of each.

    Images without an instance are left out, as detectron2 does: there is nothing to find in them.

    Args:
        split: with at least one instance.
        classes: names by category; an instance's label is its category's place here, from 0.
        masks: whether every instance must have one.

    Raises:
        InputError: no instance, one without a mask, or one of another class.
    """

    def __init__(self, split: CocoSplit, classes: Sequence[str], *, masks: bool) -> None:
        data = align_categories(read_coco(split.annotations), classes, split.annotations)
        self.split = split
        self._labels = {category["id"]: label for label, category in enumerate(data["categories"])}
        self._rows = _instances(data)
        self.images: list[Json] = [image for image in data["images"] if image["id"] in self._rows]
        if not self.images:
            raise InputError(f"{split.annotations}: no instance to train on; give another split")
        bare = next((row for rows in self._rows.values() for row in rows if masks and "segmentation" not in row), None)
        if bare is not None:
            raise InputError(f"{split.annotations}: annotation {bare.get('id')!r} has no segmentation; {GIVE_MASK}")

    def rows(self, image: Json) -> list[Json]:
        """The annotations of an image, each with its ``label``."""
        return [{**row, "label": self._labels[row["category_id"]]} for row in self._rows[image["id"]]]

    def read(self, image: Json) -> Pixels:
        """The pixels of an image.

        Raises:
            LocalError: it cannot be read, or has another size than the annotations say.
        """
        path = self.split.path(image)
        try:
            return decode(path.read_bytes(), expect=(image["height"], image["width"]))
        except (OSError, BadSample) as error:
            raise LocalError(f"{path}: {getattr(error, 'strerror', None) or error}; {REMEDY}") from None


class TrainingImages(Dataset[Example | str]):
    """The examples of a split by place in their order; what is wrong with one comes as text, for a worker's exception
    would reach the user as a page of traceback.

    Args:
        split, classes: as ``Annotated`` takes them.
        masks: whether targets have masks.

    Raises:
        InputError: as ``Annotated``.
    """

    def __init__(self, split: CocoSplit, classes: Sequence[str], batch_size: int, seed: int, *, masks: bool) -> None:
        self._annotated, self._masks = Annotated(split, classes, masks=masks), masks
        self.order = ImageOrder(len(self._annotated.images), batch_size, seed)

    def __len__(self) -> int:
        return self.order.count

    def __getitem__(self, place: int) -> Example | str:
        number, flipped = self.order.image(place)
        image = self._annotated.images[number]
        try:
            pixels_HWC = self._annotated.read(image)
            target = self._target(image)
        except InputError as error:
            return str(error)
        pixels = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous().float() / 255
        return Example(pixels, target) if not flipped else _flipped(pixels, target)

    def _target(self, image: Json) -> dict[str, Tensor]:
        rows = self._annotated.rows(image)
        boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
        boxes_N4[:, 2:] += boxes_N4[:, :2]
        target = {"boxes": boxes_N4, "labels": torch.tensor([row["label"] for row in rows])}
        if self._masks:
            masks = [decode_mask(row["segmentation"], image["height"], image["width"]) for row in rows]
            target["masks"] = torch.from_numpy(np.stack(masks).astype(np.uint8))
        return target


def _instances(data: Json) -> dict[int, list[Json]]:
    """Annotations by image, without crowds and boxes without area, which no detector is trained on."""
    rows: dict[int, list[Json]] = defaultdict(list)
    for row in data["annotations"]:
        if not row["iscrowd"] and min(row["bbox"][2:]) > 0:
            rows[row["image_id"]].append(row)
    return dict(rows)


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
    """This rank's share of the batches of ``steps``, as ``read_batches`` gives it.

    Args:
        images: training images with their order.
        steps: optimizer steps, from 0.
        rank: this process.
        world: processes.
        workers: decoding processes.
        device: where the images go.
    """
    pin = device.type == "cuda"
    batches = read_batches(images, images.order, steps, rank=rank, world=world, workers=workers, pin=pin)
    for step, examples in zip(steps, batches, strict=True):
        moved = [_moved(example, device) for example in examples]
        yield ImageStep(images.order.places(step)[0] // images.order.count, [ImageBatch(step, moved)])


def read_batches(
    images: Dataset[T | str], order: ImageOrder, steps: range, *, rank: int, world: int, workers: int, pin: bool
) -> Iterator[list[T]]:
    """This rank's share of the batches of ``steps``: every W-th image of ``images``, which reads them by place.

    Args:
        images: read by place.
        order: which images a step takes.
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
    if order.batch_size % world:
        raise InputError(
            f"batch_size is {order.batch_size}, on {world} processes: use a multiple of {world}, or another number of "
            "processes"
        )
    places = [place for step in steps for place in order.places(step)[rank::world]]
    per_rank = order.batch_size // world
    loader = DataLoader(
        images,
        sampler=places,
        batch_size=per_rank,
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


def _moved(example: Example, device: torch.device) -> Example:
    target = {name: value.to(device, non_blocking=True) for name, value in example.target.items()}
    return Example(example.pixels.to(device, non_blocking=True), target)
