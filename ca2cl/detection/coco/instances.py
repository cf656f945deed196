"""Split a label mask into instances, without stray pixels.

The rule: an instance of fewer than ``min_area`` pixels is dropped. Of any other, separate parts (8-connected) of fewer
than ``min_area`` pixels are dropped, smallest first, for as long as all that is dropped stays within ``max_loss`` of
the instance. So a stray pixel does not stretch a gland's box across the image, and what is kept of an instance has an
IoU of at least 1 - ``max_loss`` with it. Parts that are large stay one instance, as they were drawn; holes stay holes.
Legend: H, W height and width in pixels of the image, h, w of an instance's box.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.data.decode import MAX_PIXELS, PILLOW_ERRORS
from ca2cl.data.orientation import orientation_of, refuse_turned
from ca2cl.detection.coco.fragment_rule import FragmentRule
from ca2cl.errors import InputError

Ids = npt.NDArray[np.int64]
"""Instance numbers (H, W), 0 the background."""
Region = npt.NDArray[np.bool_]

MASK_EXTENSIONS = frozenset({"png", "bmp", "tif", "tiff"})
"""Formats that keep numbers as they are; JPEG and WebP blur them."""
_FORMATS = ("PNG", "BMP", "TIFF")
# a palette's indices are the numbers, whatever colours they are shown in
_INTEGER_MODES = frozenset({"L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N"})
_ENTER = "give one channel of whole numbers, one number an instance and 0 between them"
TOUCHING = np.ones((3, 3), int)
"""Neighbours of a pixel, corners included."""


class Instance(NamedTuple):
    """One object of an image."""

    number: int
    """Its number in the mask."""
    y: int
    x: int
    """Upper left corner of its box."""
    mask: Region
    """Its pixels inside the box, (h, w); each side of the box has one."""

    @property
    def area(self) -> int:
        """Pixels, holes not counted."""
        return int(self.mask.sum())


@dataclass
class Dropped:
    """Counts of what was dropped."""

    instances: int = 0
    fragments: int = 0
    """Parts of instances that were kept."""
    pixels: int = 0


def read_mask(path: Path, size: tuple[int, int], *, black_and_white: bool = False) -> Ids:
    """The numbers of a mask, from an 8-, 16- or 32-bit PNG, BMP or TIFF; ``mask_checks`` finds out
    whether they are those of instances.

    Args:
        size: H and W of the image.
        black_and_white: take masks of one bit, too.

    Raises:
        InputError: unreadable, of another size, in colour, not whole numbers, black and white, or to be shown turned.
    """
    try:
        content = path.read_bytes()
        refuse_turned(path, orientation_of(content))
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            _check_header(path, image, size, black_and_white)
            ids_HW: Ids = np.asarray(image).astype(np.int64)
    except InputError:
        raise
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        reason = "not a whole PNG, BMP or TIFF" if "cannot identify" in str(error) else " ".join(str(error).split())
        raise InputError(f"{path}: the mask does not decode ({reason}); restore it") from None
    return ids_HW


def _check_header(path: Path, image: Image.Image, size: tuple[int, int], black_and_white: bool) -> None:
    here = (image.height, image.width)
    if here[0] * here[1] > MAX_PIXELS:
        raise InputError(f"{path}: {here[0]} x {here[1]} pixels are above the limit of {MAX_PIXELS}; cut it up")
    if image.mode == "1" and not black_and_white:
        raise InputError(f"{path}: the mask is black and white (1 bit), so touching glands are one; {_ENTER}")
    if image.mode == "F":
        raise InputError(f"{path}: the mask holds fractions (32-bit float), not whole numbers; {_ENTER}")
    if image.mode not in _INTEGER_MODES | {"1"}:
        raise InputError(f"{path}: the mask is {image.mode}, in colour or with transparency; {_ENTER}")
    if here != size:
        raise InputError(
            f"{path}: the mask is {here[0]} x {here[1]} pixels, its image {size[0]} x {size[1]}; restore the pair"
        )


def find_instances(ids_HW: Ids, rule: FragmentRule, dropped: Dropped) -> list[Instance]:
    """The instances of a mask in ascending order of their numbers.

    Args:
        dropped: is added to.
    """
    # Numbers may be any (16 bits and more), and find_objects makes a list as long as the largest.
    numbers, dense = np.unique(np.append(0, ids_HW), return_inverse=True)
    dense_HW = dense[1:].reshape(ids_HW.shape)
    found: list[Instance] = []
    for place, box in enumerate(ndimage.find_objects(dense_HW), start=1):
        own = dense_HW[box] == place
        area = int(own.sum())
        if area < rule.min_area:
            dropped.instances += 1
            dropped.pixels += area
            continue
        kept = _without_fragments(own, rule, dropped)
        (tight,) = ndimage.find_objects(kept.astype(np.uint8))  # smaller, where a fragment stretched the box
        y, x = (int(outer.start + inner.start) for outer, inner in zip(box, tight, strict=True))
        found.append(Instance(int(numbers[place]), y, x, kept[tight]))
    return found


def _without_fragments(own: Region, rule: FragmentRule, dropped: Dropped) -> Region:
    parts, count = ndimage.label(own, TOUCHING)
    if count < 2:
        return own
    sizes = np.bincount(parts.ravel())[1:]
    order = np.argsort(sizes, kind="stable")
    total = np.cumsum(sizes[order])
    gone = order[(sizes[order] < rule.min_area) & (total <= rule.max_loss * total[-1])]
    dropped.fragments += len(gone)
    dropped.pixels += int(sizes[gone].sum())
    kept: Region = own & ~np.isin(parts, gone + 1)
    return kept
