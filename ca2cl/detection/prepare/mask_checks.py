"""Check that masks number their instances.

Masks of classes, of foreground (0 and one value), and with a background or a border of 255 are of the same file types
as masks of instances. A number that stands for several objects gives one box around all of them, which trains and
scores without an error. So masks are compared with the properties of instances: nearly all of them are in one piece,
a set has images with more than one, and the background is 0.
Legend: H, W height and width in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.detection.coco.instances import TOUCHING, Ids, Instance
from ca2cl.errors import InputError

_IGNORED = (255, 65535)
"""What other tools write for background, border or "not annotated"."""
_PART = 0.1
"""Share of an instance from which on a part that lies apart is an object of its own."""
SPLIT = "--apart split makes every connected part an instance, and touching ones then stay one"


def check_numbers(path: Path, ids_HW: Ids) -> None:
    """Check the numbers of one mask.

    Raises:
        InputError: it is no mask of instances.
    """
    numbers, counts = np.unique(ids_HW, return_counts=True)
    if numbers[0] < 0:
        raise InputError(f"{path}: the mask holds {numbers[0]}; give whole numbers, 0 between the instances")
    own, most = numbers[numbers > 0], int(numbers[np.argmax(counts)])
    if own.tolist() == [255]:
        raise InputError(f"{path}: the mask holds 0 and 255 only, which says where glands are and not which; {SPLIT}")
    edges = (ids_HW[0], ids_HW[-1], ids_HW[:, 0], ids_HW[:, -1])
    if numbers[0] and (len(own) > 1 or most in _IGNORED) and all((edge == most).any() for edge in edges):
        raise InputError(f"{path}: the mask holds no 0, and {most} all around: set the background to 0")
    highest, others = int(numbers[-1]), own[:-1].tolist()
    if highest in _IGNORED and others == list(range(1, len(own))) and highest != len(own):
        raise InputError(
            f"{path}: the mask holds {f'1 to {len(others)}' if others else 'nothing'} and {highest}, which other tools "
            "write for background or border; set it to 0"
        )


def split_parts(ids_HW: Ids) -> Ids:
    """A mask in which every connected part (8-connected) of a number has a number of its own."""
    made_HW, count = np.zeros_like(ids_HW), 0
    for number in np.unique(ids_HW[ids_HW != 0]):
        parts_HW, more = ndimage.label(ids_HW == number, TOUCHING)
        made_HW[parts_HW > 0] = parts_HW[parts_HW > 0] + count
        count += more
    return made_HW


@dataclass
class Survey:
    """Properties of a whole set of masks."""

    least: int
    """Pixels of a part that counts."""
    masks: int = 0
    """With an instance."""
    instances: int = 0
    apart: list[str] = field(default_factory=list)
    """Instances that lie in several places, by mask and number."""
    around: int = 0
    """Masks in which a number touches all four sides of the image."""
    numbers: set[int] = field(default_factory=set)

    def add(self, path: Path, instances: Sequence[Instance], size: tuple[int, int]) -> None:
        """Take in one mask."""
        self.masks += bool(instances)
        self.instances += len(instances)
        self.around += any(instance.mask.shape == size for instance in instances)
        for instance in instances:
            self.numbers.add(instance.number)
            if self._lies_apart(instance):
                self.apart.append(f"{instance.number} in {path.name}")

    def _lies_apart(self, instance: Instance) -> bool:
        parts, count = ndimage.label(instance.mask, TOUCHING)
        if count < 2:
            return False
        sizes = np.bincount(parts.ravel())[1:]
        return bool((sizes >= max(self.least, _PART * sizes.sum())).sum() > 1)

    def refuse_classes(self, root: Path) -> None:
        """Refuse a set whose numbers are not those of instances.

        Raises:
            InputError: its masks are of classes or of foreground, as far as can be seen.
        """
        one = next(iter(self.numbers)) if len(self.numbers) == 1 else None
        fault = ""
        if one is not None and self.apart:
            fault = f"every mask holds the number {one} alone, and {len(self.apart)} times for parts that lie apart"
        elif one is not None and self.masks > 1 and (one != 1 or 2 * self.around > self.masks):
            fault = f"all {self.masks} masks hold the number {one} alone, as masks of foreground or of background do"
        elif 2 * len(self.apart) > self.instances:
            fault = f"{len(self.apart)} of {self.instances} numbers stand for parts that lie apart"
        if fault:
            first = f" (the first: {self.apart[0]})" if self.apart else ""
            raise InputError(
                f"{root}: {fault}{first}: masks of classes, not of instances? Number each gland; {SPLIT}; --apart keep "
                "takes them as they are"
            )
