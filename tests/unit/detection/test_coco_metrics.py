"""COCO's average precision of boxes and masks: known cases, nothing on stdout, nothing changed, bad results refused."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from ca2cl.detection.coco.files import CATEGORIES, Json, annotation, encode_mask
from ca2cl.detection.coco.fragment_rule import FragmentRule
from ca2cl.detection.coco.instances import Dropped, find_instances
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.engines.predictions import Detections, coco_results, label_mask
from ca2cl.detection.engines.settings import Schedule
from ca2cl.errors import InputError
from tests.support.glands import Mask, disc

SIZE = (200, 200)


def glands() -> Mask:
    """One small (up to 32 x 32 pixels), one medium, one large."""
    mask = np.zeros(SIZE, np.int64)
    disc(mask, 1, 20, 20, 10)
    disc(mask, 2, 40, 150, 30)
    disc(mask, 3, 130, 80, 60)
    return mask


def truth(*masks: Mask) -> Json:
    """The content of a COCO file."""
    data: Json = {"images": [], "annotations": [], "categories": list(CATEGORIES)}
    for number, mask in enumerate(masks, start=1):
        data["images"].append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        for one in find_instances(mask, FragmentRule(), Dropped()):
            data["annotations"].append(annotation(len(data["annotations"]) + 1, number, one, SIZE))
    return data


def detections(mask: Mask, scores: list[float], masks: bool = True) -> Detections:
    """The objects of a mask in order of their numbers, as an engine would return them."""
    own = [mask == number for number in np.unique(mask)[1:]]
    edges = [np.nonzero(one) for one in own]
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in edges]
    return Detections(
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores, np.float32),
        np.zeros(len(own), np.int64),
        [encode_mask(one) for one in own] if masks else None,
    )


def results(mask: Mask, scores: list[float], masks: bool = True) -> list[Json]:
    return coco_results(1, detections(mask, scores, masks), [1])


def test_what_was_annotated_scores_1_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    found = coco_scores(truth(glands()), results(glands(), [0.5, 0.9, 0.7]))
    names = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")
    assert found == {f"{kind}/{name}": pytest.approx(1) for kind in ("box", "mask") for name in names}
    assert capfd.readouterr().out == ""


def test_a_gland_found_at_an_iou_between_counts_for_half_of_the_thresholds() -> None:
    """One gland of 100 x 40 pixels, found as 100 x 30: IoU .75, so right at .50, .55, ... .75, six of ten."""
    mask, less = np.zeros(SIZE, np.int64), np.zeros(SIZE, np.int64)
    mask[50:90, 50:150], less[50:80, 50:150] = 1, 1
    found = coco_scores(truth(mask), results(less, [0.9]))
    assert found["box/AP"] == found["mask/AP"] == pytest.approx(0.6)
    assert found["box/AP50"] == found["box/AP75"] == pytest.approx(1)
    assert "box/AP_small" not in found and "mask/AP_large" not in found  # no annotation is of these sizes


def test_a_box_may_be_right_where_the_mask_is_not() -> None:
    ring = glands()
    disc(ring, 0, 130, 80, 58)
    found = coco_scores(truth(glands()), results(ring, [0.9, 0.9, 0.9]))
    assert found["box/AP_large"] == pytest.approx(1) and found["mask/AP_large"] == 0
    assert found["mask/AP_small"] == pytest.approx(1)


def test_a_mask_has_its_own_size_and_not_its_boxs() -> None:
    """A diagonal of 1,000 pixels in a box of 10,000: what is invented is small, and hurts only the small."""
    diagonal = np.zeros(SIZE, np.int64)
    rows = np.arange(100)
    for shift in range(10):
        diagonal[rows + 100, np.minimum(rows + shift + 90, 199)] = 1
    invented = results(diagonal, [0.99])
    found = coco_scores(truth(glands()), [*results(glands(), [0.5, 0.5, 0.5]), *invented])
    assert found["mask/AP_small"] < 0.6 and found["mask/AP_large"] == found["mask/AP_medium"] == pytest.approx(1)
    assert found["box/AP_small"] == pytest.approx(1) and found["box/AP_large"] < 0.6


def test_a_false_alarm_counts_by_its_score() -> None:
    wrong = np.zeros(SIZE, np.int64)
    disc(wrong, 1, 180, 180, 15)
    after, before = (
        coco_scores(truth(glands()), [*results(glands(), [0.8] * 3), *results(wrong, [score])])["mask/AP50"]
        for score in (0.1, 0.9)
    )
    assert after == pytest.approx(1) and before == pytest.approx(0.75)  # precision 3/4 at every recall


def test_no_result_is_0_and_boxes_alone_have_no_mask_scores() -> None:
    assert set(coco_scores(truth(glands()), []).values()) == {0.0}
    boxes = coco_scores(truth(glands()), results(glands(), [0.9] * 3, masks=False))
    assert boxes["box/AP"] == pytest.approx(1) and not [name for name in boxes if name.startswith("mask")]


def test_scoring_changes_nothing_of_the_callers() -> None:
    data, rows = truth(glands(), glands()), results(glands(), [0.9] * 3)
    before = copy.deepcopy((data, rows))
    first = coco_scores(data, rows)
    assert (data, rows) == before
    assert coco_scores(data, rows) == first
    assert first["box/AP50"] == pytest.approx(0.504950, abs=1e-6)  # recall 1/2: 51 of COCO's 101 levels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, "image_id 9 is not in the COCO file"),
        ({"category_id": 2}, r"category_id 2; the file has \[1\]"),
        ({"score": float("nan")}, "score is nan"),
        ({"bbox": None}, "lacks bbox"),
        ({"segmentation": None}, "result 1: lacks segmentation"),
    ],
)
def test_bad_results_are_refused(change: dict[str, Any], message: str) -> None:
    rows = results(glands(), [0.9] * 3)
    rows[1] = {name: value for name, value in {**rows[1], **change}.items() if value is not None}
    with pytest.raises(InputError, match=message):
        coco_scores(truth(glands()), rows)


def test_a_file_without_annotations_has_no_score() -> None:
    with pytest.raises(InputError, match="no annotation"):
        coco_scores(truth(np.zeros(SIZE, np.int64)), [])


def test_a_label_mask_has_the_best_on_top() -> None:
    low, high = np.zeros(SIZE, np.int64), np.zeros(SIZE, np.int64)
    low[10:50, 10:50], high[30:70, 30:70] = 1, 1
    hidden = np.zeros(SIZE, np.int64)
    hidden[31:33, 31:33] = 1
    found = Detections(
        np.zeros((4, 4), np.float32),
        np.array([0.6, 0.9, 0.4, 0.7], np.float32),
        np.zeros(4, np.int64),
        [encode_mask(mask > 0) for mask in (low, high, glands(), hidden)],
    )
    ids = label_mask(found, *SIZE)
    assert np.unique(ids).tolist() == [0, 1, 3]
    assert np.array_equal(ids == 1, high > 0) and np.array_equal(ids == 3, (low > 0) & (high == 0))
    assert not label_mask(found, *SIZE, min_score=0.95).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"milestones": (8, 5)}, "milestones is"),
        ({"milestones": (10,)}, "between 0 and 10"),
        ({"train_sides": ()}, "train_sides is"),
        ({"longest_side": 500}, "longest_side is 500"),
        ({"warmup": -1}, "warmup is -1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"iterations": 10, "batch_size": 2, "lr": 0.02, "warmup": 1, "milestones": (5, 8)}
    Schedule(**usual)
    with pytest.raises(InputError, match=message):
        Schedule(**{**usual, **change})
