"""GlaS challenge metrics: object-level F1, Dice and Hausdorff distance.

Written from the definitions in Sirinukunwattana et al., "Gland segmentation in colon histology images: the GlaS
challenge contest", Medical Image Analysis 35 (2017), section on evaluation (arXiv 1603.00275). S are the predicted
objects and G the annotated ones of all images of a set; G*(S_i) is the annotated object of the same image with the
largest overlap with S_i, and S*(G_j) the other way round.

    F1:         S_i is a true positive if it covers more than half of G*(S_i), else a false positive; a G_j without a
                true positive is a false negative. (The paper's words are "at least 50 %"; strictly more keeps the
                match one to one, where two halves of a gland would both be right.)
    Dice:       1/2 [sum_i w_i D(S_i, G*(S_i)) + sum_j v_j D(G_j, S*(G_j))], w_i = |S_i| / sum |S|,
                v_j = |G_j| / sum |G|; D is 0 for an object that overlaps with none
    Hausdorff:  the same sum of H instead of D; for an object that overlaps with none the partner is that of the same
                image with the smallest H. H(A, B) = max(max_a min_b |a - b|, max_b min_a |a - b|) over all pixels.

Weights run over the whole set, so large glands count for more wherever they lie. What the paper leaves open: in an
image with objects on one side only, H is the image's diagonal, the largest distance in it (an infinite one would hide
all other images); where a whole set has objects on one side only, their sum alone is the Hausdorff distance; where it
has none at all, F1 and Dice are 1 and Hausdorff 0. On equal overlaps the lower number is the partner. Distances are in
pixels.
Legend: H, W height and width, s and g numbers of objects of an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]

from ca2cl.errors import InputError

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Side(NamedTuple):
    """The objects of one image on one side, predicted or annotated, against their partners on the other."""

    area: Integers
    """Pixels, (objects,)."""
    dice: Floats
    hausdorff: Floats
    """Pixels."""


@dataclass(frozen=True)
class ImageScores:
    """Scores of the objects of one image, before they are summed."""

    true_positives: int
    predicted: Side
    annotated: Side


@dataclass(frozen=True)
class GlasScores:
    """The challenge's scores of a set of images."""

    f1: float
    precision: float
    recall: float
    dice: float
    """Object-level Dice."""
    hausdorff: float
    """Object-level Hausdorff distance in pixels."""
    true_positives: int
    false_positives: int
    false_negatives: int


def glas_scores(pairs: Iterable[tuple[npt.NDArray[Any], npt.NDArray[Any]]]) -> GlasScores:
    """The scores of a set: all objects of all images together, as the challenge ranks.

    Args:
        pairs: annotated and predicted mask of every image, instance numbers (H, W), 0 the background.

    Raises:
        InputError: masks of different sizes, or not whole numbers.
    """
    return pooled([compare(annotated_HW, predicted_HW) for annotated_HW, predicted_HW in pairs])


def pooled(images: Iterable[ImageScores]) -> GlasScores:
    """The scores of a set from those of its images."""
    found = list(images)
    positives = sum(image.true_positives for image in found)
    predicted = _joined([image.predicted for image in found])
    annotated = _joined([image.annotated for image in found])
    predicted_count, annotated_count = len(predicted.area), len(annotated.area)
    both = predicted_count + annotated_count
    dice = (_weighted(predicted.area, predicted.dice) + _weighted(annotated.area, annotated.dice)) / 2
    none = float(both == 0)  # nothing was there, and nothing was found
    return GlasScores(
        f1=2 * positives / both if both else none,
        precision=positives / predicted_count if predicted_count else none,
        recall=positives / annotated_count if annotated_count else none,
        dice=dice if both else none,
        hausdorff=_hausdorff_of(predicted, annotated),
        true_positives=positives,
        false_positives=predicted_count - positives,
        false_negatives=annotated_count - positives,
    )


def _joined(sides: list[Side]) -> Side:
    nothing = Side(np.zeros(0, np.int64), np.zeros(0), np.zeros(0))
    return Side(*map(np.concatenate, zip(nothing, *sides, strict=True)))


def _weighted(area: Integers, values: Floats) -> float:
    """Sum of ``values`` by share of area; 0 without objects."""
    return float((area * values).sum() / area.sum()) if len(area) else 0.0


def _hausdorff_of(predicted: Side, annotated: Side) -> float:
    sums = [_weighted(side.area, side.hausdorff) for side in (predicted, annotated) if len(side.area)]
    return sum(sums) / len(sums) if sums else 0.0


def compare(annotated_HW: npt.NDArray[Any], predicted_HW: npt.NDArray[Any]) -> ImageScores:
    """The scores of one image's objects, for ``pooled``.

    Raises:
        InputError: masks of different sizes, or not whole numbers.
    """
    _check(annotated_HW, predicted_HW)
    predicted, annotated = _Objects(predicted_HW), _Objects(annotated_HW)
    pair_HW = predicted.dense_HW * (annotated.count + 1) + annotated.dense_HW
    table = np.bincount(pair_HW.ravel(), minlength=(predicted.count + 1) * (annotated.count + 1))
    overlap_SG = table.reshape(predicted.count + 1, annotated.count + 1)[1:, 1:]
    known: dict[tuple[int, int], float] = {}

    def distance(s: int, g: int) -> float:
        # nearly every pair is needed twice, once from either side
        if (s, g) not in known:
            known[s, g] = hausdorff(predicted, s, annotated, g)
        return known[s, g]

    return ImageScores(
        _true_positives(overlap_SG, annotated.area),
        _side(overlap_SG, predicted, annotated, distance),
        _side(overlap_SG.T, annotated, predicted, lambda g, s: distance(s, g)),
    )


class _Objects:
    """The objects of one mask, numbered from 0."""

    def __init__(self, ids_HW: npt.NDArray[Any]) -> None:
        numbers, dense = np.unique(np.append(0, ids_HW), return_inverse=True)
        self.count = len(numbers) - 1
        self.dense_HW: Integers = dense[1:].reshape(ids_HW.shape)
        """Number plus one, 0 the background."""
        self.area: Integers = np.bincount(self.dense_HW.ravel(), minlength=self.count + 1)[1:]
        boxes = ndimage.find_objects(self.dense_HW)
        self.box = np.array([[y.start, x.start, y.stop, x.stop] for y, x in boxes], np.int64).reshape(-1, 4)
        """Top, left, bottom and right of each."""


def hausdorff(first: _Objects, a: int, second: _Objects, b: int) -> float:
    """H of object ``a`` of one mask and ``b`` of another, over all their pixels.

    Args:
        first: objects of one mask.
        a: number of an object of it.
        second: objects of the other mask.
        b: number of an object of it.
    """
    top, left = np.minimum(first.box[a, :2], second.box[b, :2])
    bottom, right = np.maximum(first.box[a, 2:], second.box[b, 2:])
    window = np.s_[top:bottom, left:right]  # holds both whole, so distances in it are distances in the image
    one, other = first.dense_HW[window] == a + 1, second.dense_HW[window] == b + 1
    there, back = ndimage.distance_transform_edt(~other)[one], ndimage.distance_transform_edt(~one)[other]
    return float(max(there.max(), back.max()))


def _true_positives(overlap_SG: Integers, area_G: Integers) -> int:
    if not overlap_SG.size:
        return 0
    partner_S = overlap_SG.argmax(1)  # on equal overlaps the lower number
    covered_S = overlap_SG[np.arange(len(overlap_SG)), partner_S]
    return int((2 * covered_S > area_G[partner_S]).sum())


def _side(overlap_OP: Integers, own: _Objects, others: _Objects, distance: Callable[[int, int], float]) -> Side:
    """Every object of one side against its partner.

    Args:
        overlap_OP: pixels that own objects O and possible partners P have in common.
        distance: H of own object o and partner p.
    """
    dice, far = np.zeros(own.count), np.zeros(own.count)
    for o in range(own.count):
        if not others.count:
            height, width = own.dense_HW.shape
            far[o] = math.hypot(height - 1, width - 1)
        elif overlap_OP[o].any():
            p = int(overlap_OP[o].argmax())
            dice[o] = 2 * overlap_OP[o, p] / (own.area[o] + others.area[p])
            far[o] = distance(o, p)
        else:
            far[o] = _nearest(own.box[o], others.box, partial(distance, o))
    return Side(own.area, dice, far)


def _nearest(box: Integers, boxes_P4: Integers, distance: Callable[[int], float]) -> float:
    """The smallest H of an object to any of the others.

    H is at least the distance between the same sides of two boxes: where one object reaches farther than the other, the
    farthest of its pixels has none nearer. So the promising are tried first and most others not at all.
    """
    bound_P = np.abs(boxes_P4 - box).max(1)
    best = math.inf
    for p in np.argsort(bound_P, kind="stable"):
        if bound_P[p] >= best:
            break
        best = min(best, distance(int(p)))
    return best


def _check(annotated_HW: npt.NDArray[Any], predicted_HW: npt.NDArray[Any]) -> None:
    if annotated_HW.ndim != 2 or annotated_HW.shape != predicted_HW.shape:
        raise InputError(f"masks are {annotated_HW.shape} and {predicted_HW.shape}: give two (H, W) of one image")
    for name, mask_HW in (("annotated", annotated_HW), ("predicted", predicted_HW)):
        if not np.issubdtype(mask_HW.dtype, np.integer) or (mask_HW.size and mask_HW.min() < 0):
            raise InputError(f"the {name} mask is {mask_HW.dtype} or negative: give instance numbers, 0 the background")
