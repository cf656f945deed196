"""Annotated images for a training: the order in which they are seen, their flips, and the targets of a detector.

Legend: N instances of one image, H, W its height and width in pixels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ca2cl.data.decode import BadSample, decode
from ca2cl.detection.coco import Json, decode_mask, read_coco
from ca2cl.detection.engine import CocoSplit
from ca2cl.errors import InputError, LocalError

Integers = npt.NDArray[np.int64]
REMEDY = "make the folder again with `ca2cl detect prepare`"
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


class TrainingImages(Dataset[Example | str]):
    """The examples of a split by place in their order; what is wrong with one comes as text, for a worker's exception
    would reach the user as a page of traceback.

    Images without an instance are left out, as detectron2 does: there is nothing to find in them.

    Args:
        split: with at least one instance.
        classes: names by category; an instance's label is its category's place here, from 0.
        masks: whether targets have masks.

    Raises:
        InputError: no instance, or classes that are not the file's.
    """

    def __init__(self, split: CocoSplit, classes: Sequence[str], batch_size: int, seed: int, *, masks: bool) -> None:
        data = read_coco(split.annotations)
        self._folder, self._masks = split.images, masks
        self._labels = labels_of(data, classes, split)
        self._rows = _instances(data)
        self._images = [image for image in data["images"] if image["id"] in self._rows]
        if not self._images:
            raise InputError(f"{split.annotations}: no instance to train on; give another split")
        self.order = ImageOrder(len(self._images), batch_size, seed)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, place: int) -> Example | str:
        number, flipped = self.order.image(place)
        image = self._images[number]
        path = self._folder / image["file_name"]
        try:
            pixels_HWC = decode(path.read_bytes(), expect=(image["height"], image["width"]))
            target = self._target(image)
        except (OSError, BadSample, InputError) as error:
            return f"{path}: {getattr(error, 'strerror', None) or error}; {REMEDY}"
        pixels = torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous().float() / 255
        return Example(pixels, target) if not flipped else _flipped(pixels, target)

    def _target(self, image: Json) -> dict[str, Tensor]:
        rows = self._rows[image["id"]]
        boxes_N4 = torch.tensor([row["bbox"] for row in rows], dtype=torch.float32)
        boxes_N4[:, 2:] += boxes_N4[:, :2]
        labels = torch.tensor([self._labels[row["category_id"]] for row in rows])
        target = {"boxes": boxes_N4, "labels": labels}
        if self._masks:
            masks = [decode_mask(row["segmentation"], image["height"], image["width"]) for row in rows]
            target["masks"] = torch.from_numpy(np.stack(masks).astype(np.uint8))
        return target


def labels_of(data: Json, classes: Sequence[str], split: CocoSplit) -> dict[int, int]:
    """Category id → label from 0.

    Raises:
        InputError: the file's categories are others.
    """
    names = {category["id"]: category["name"] for category in data["categories"]}
    if sorted(names.values()) != sorted(classes):
        raise InputError(
            f"{split.annotations}: has the classes {', '.join(sorted(names.values()))}, not {', '.join(classes)}; "
            "give splits of one data set"
        )
    return {number: list(classes).index(name) for number, name in names.items()}


def _instances(data: Json) -> dict[int, list[Json]]:
    """Annotations by image, without crowds and boxes without area, which no detector is trained on."""
    rows: dict[int, list[Json]] = defaultdict(list)
    for row in data["annotations"]:
        if not row.get("iscrowd") and min(row["bbox"][2:]) > 0:
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
    """This rank's share of the batches of ``steps``: every W-th image.

    Raises:
        InputError: ``batch_size`` is not a multiple of the number of processes: the losses are means over a process's
            images, and images of a smaller share would weigh more.
        LocalError: an image cannot be read.
    """
    order = images.order
    if order.batch_size % world:
        raise InputError(
            f"batch_size is {order.batch_size}, on {world} processes: use a multiple of {world}, or another number of "
            "processes"
        )
    places = [place for step in steps for place in order.places(step)[rank::world]]
    loader = DataLoader(
        images,
        sampler=places,
        batch_size=order.batch_size // world,
        num_workers=workers,
        collate_fn=list,
        pin_memory=device.type == "cuda",
    )
    for step, examples in zip(steps, loader, strict=True):
        problem = next((one for one in examples if isinstance(one, str)), None)
        if problem:
            raise LocalError(problem)
        moved = [_moved(example, device) for example in examples]
        yield ImageStep(order.places(step)[0] // order.count, [ImageBatch(step, moved)])


def _moved(example: Example, device: torch.device) -> Example:
    target = {name: value.to(device, non_blocking=True) for name, value in example.target.items()}
    return Example(example.pixels.to(device, non_blocking=True), target)
