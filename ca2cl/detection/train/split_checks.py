"""Check the data of training and scoring before the first step.

A detector trains for hours: a fault that only its scoring would meet must not cost them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from ca2cl.common.console.progress import ProgressBar
from ca2cl.data.decode import BadSample, decode
from ca2cl.data.orientation import orientation_of, refuse_turned
from ca2cl.data.shards.writer import image_size
from ca2cl.detection.coco.files import align_categories, read_coco
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.engines.data import annotated_classes
from ca2cl.errors import InputError
from ca2cl.evaluation.leaks.find import Side, find_leak
from ca2cl.evaluation.leaks.pretraining import Pretrained
from ca2cl.evaluation.leaks.wording import Leak


def check_splits(splits: Mapping[str, CocoSplit], *, masks: bool) -> None:
    """Read every file and every image; log what is not taken as it stands in them.

    Args:
        splits: ``train``, and those that are scored, by name.
        masks: whether the detector has any.

    Raises:
        InputError: nothing to train on or to score; classes that are not trained; an instance without a mask; an image
            that is missing, damaged, of another size than in its file, or noted to be shown turned.
    """
    train = splits["train"]
    data = read_coco(train.annotations, warn=True)
    classes = [category["name"] for category in data["categories"]]
    trained = annotated_classes(train, data, "to train on", masks=masks)
    used = {row["image_id"] for row in data["annotations"]}
    _check_images(train, [image for image in data["images"] if image["id"] in used], whole=False)
    for split in (split for name, split in splits.items() if name != "train"):
        data = align_categories(read_coco(split.annotations, warn=True), classes, split.annotations)
        new = sorted(annotated_classes(split, data, "to score on", masks=masks) - trained)
        if new:
            raise InputError(
                f"{split.annotations}: has instances of the class {new[0]!r}, and {train.annotations} has none to "
                "train on; give other splits, or take the class out of this one"
            )
        _check_images(split, data["images"], whole=True)


def _check_images(split: CocoSplit, images: Iterable[Json], *, whole: bool) -> None:
    """``whole``: decode them; otherwise read their headers only, for training meets a damaged one in its first pass."""
    for image in ProgressBar(images, desc=f"check {split.images.name}", unit="image", leave=False):
        path, size = split.path(image), (image["height"], image["width"])
        try:
            content = path.read_bytes()
            if whole:
                decode(content, expect=size)
            elif (found := image_size(content, str(path))) != size:
                raise BadSample(f"{found[0]} x {found[1]} pixels, expected {size[0]} x {size[1]}")
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}; {split.annotations} lists it as image {image['id']!r}: restore it, or give "
                "file_name as its path in the split's folder"
            ) from None
        except BadSample as error:
            raise InputError(f"{path}: {error}; restore it, or correct {split.annotations}") from None
        refuse_turned(path, orientation_of(content))


def find_shared(
    train: CocoSplit, tests: Mapping[str, CocoSplit], encoders: Mapping[str, Pretrained] | None = None
) -> dict[str, Leak]:
    """What each test split shares with train, and with the training data of the encoders. Warns if anything; patients
    are compared where both sides name them.

    Raises:
        InputError: a file is damaged.
    """
    side = _side(train)
    return {
        name: find_leak(side, _side(split), name=name, encoders=encoders, what="images")
        for name, split in tests.items()
    }


def _side(split: CocoSplit) -> Side:
    images = read_coco(split.annotations)["images"]
    paths = [split.images / image["file_name"] for image in images]
    return Side(
        digest=hashlib.sha256(split.annotations.read_bytes()).hexdigest(),
        keys=(),  # ids begin anew in every split: equal ones mean nothing
        samples=[image["id"] for image in images],
        groups=[str(image["patient_id"]) if "patient_id" in image else None for image in images],
        pixels=[_digest(path) for path in paths],
    )


def _digest(path: Path) -> bytes:
    """Of the file, or of its name where an image that nothing is annotated in is not there."""
    content = path.read_bytes() if path.is_file() else str(path).encode()
    return hashlib.blake2b(content, digest_size=16).digest()
