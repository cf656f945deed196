"""Check the data of training and scoring before the first step.

A detector trains for hours: a fault that only its scoring would meet must not cost them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tqdm import tqdm

from ca2cl.data.decode import BadSample, decode
from ca2cl.data.orientation import orientation_of, refuse_turned
from ca2cl.data.shards.writer import image_size
from ca2cl.detection.coco.files import align_categories, read_coco
from ca2cl.detection.coco.segmentations import Json
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.engines.data import GIVE_MASK
from ca2cl.errors import InputError


def check_splits(train: CocoSplit, tests: Mapping[str, CocoSplit], *, masks: bool) -> None:
    """Read every file and every image; log what is not taken as it stands in them.

    Args:
        tests: the splits that are scored, by name.
        masks: whether the detector has any.

    Raises:
        InputError: nothing to train on or to score; classes that are not trained; an instance without a mask; an image
            that is missing, damaged, of another size than its file says, or noted to be shown turned.
    """
    data = read_coco(train.annotations, says=True)
    classes = [category["name"] for category in data["categories"]]
    trained = _instances(train, data, masks, "to train on")
    used = {row["image_id"] for row in data["annotations"]}
    _check_images(train, [image for image in data["images"] if image["id"] in used], whole=False)
    for split in tests.values():
        data = align_categories(read_coco(split.annotations, says=True), classes, split.annotations)
        new = sorted(_instances(split, data, masks, "to score on") - trained)
        if new:
            raise InputError(
                f"{split.annotations}: has instances of the class {new[0]!r}, and {train.annotations} has none to "
                "train on; give other splits, or take the class out of this one"
            )
        _check_images(split, data["images"], whole=True)


def _instances(split: CocoSplit, data: Json, masks: bool, use: str) -> set[str]:
    """Names of the classes that have instances."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = {names[row["category_id"]] for row in data["annotations"] if not row["iscrowd"]}
    if not found:
        raise InputError(f"{split.annotations}: has no instance {use}; annotate it, or give another split")
    bare = next((row for row in data["annotations"] if masks and "segmentation" not in row), None)
    if bare is not None:
        raise InputError(f"{split.annotations}: annotation {bare.get('id')!r} has no segmentation; {GIVE_MASK}")
    return found


def _check_images(split: CocoSplit, images: Iterable[Json], *, whole: bool) -> None:
    """``whole``: decode them; otherwise read their headers only, for training meets a damaged one in its first pass."""
    for image in tqdm(images, desc=f"check {split.images.name}", unit="image", disable=None, leave=False):
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
