"""Masks that number something else than instances are told from those that do, by what a whole set has in common."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ca2cl.cli import main
from tests.support.gland_images import write_glands
from tests.support.glands import Mask, disc, gland_mask, save_pair

FOUR = ((16, 16), (16, 48), (48, 16), (48, 48))


def spots(numbers: Sequence[int], places: Sequence[tuple[int, int]] = FOUR, ground: int = 0) -> Mask:
    """A mask of 64 x 64 pixels with a disc of each number."""
    mask = np.full((64, 64), ground, np.uint16 if max(numbers) > 255 else np.uint8)
    for number, (y, x) in zip(numbers, places, strict=False):
        disc(mask, number, y, x, 9)
    return mask


def ringed(number: int) -> Mask:
    """Instances 1 to 4, each in a ring."""
    mask = np.zeros((64, 64), np.uint8)
    for place, (y, x) in enumerate(FOUR, start=1):
        disc(mask, number, y, x, 12)
        disc(mask, place, y, x, 9)
    return mask


def framed() -> Mask:
    """Instance 1, and 255 where the slide ends."""
    mask = spots([1])
    mask[60:] = 255
    return mask


def inverted() -> Mask:
    return np.where(spots([1, 2, 3, 4]) > 0, 0, 1).astype(np.uint8)


def prepare(root: Path, masks: Sequence[Mask], *more: str) -> int:
    for number, mask in enumerate(masks):
        save_pair(root / "in/images" / f"{number}.png", root / "in/masks" / f"{number}.png", mask, number)
    return main(["detect", "prepare", "masks", str(root / "in"), str(root / "out"), *more])


CLASSES: dict[str, tuple[list[Mask], str]] = {
    "0 and 1": ([spots([1, 1, 1])] * 3, "the number 1 alone, and 3 times for parts that lie apart"),
    "0 and 1, one object in most": ([spots([1]), spots([1]), spots([1, 1])], "the number 1 alone, and 1 times"),
    "0 and 128": ([spots([128])] * 2, "all 2 masks hold the number 128 alone"),
    "0 and 128 of one mask": ([spots([128, 128])], "the number 128 alone, and 1 times for parts"),
    "0 and 255": ([spots([255])], "holds 0 and 255 only"),
    "three classes": ([spots([1, 1, 2, 2]), spots([1, 3, 1, 3])], "4 of 4 numbers stand for parts that lie apart"),
    "grey classes": ([spots([85, 85, 170, 170])] * 2, "4 of 4 numbers stand for parts"),
    "a background of 255": ([spots([1, 2, 3], ground=255)], "0.png: the mask holds no 0, and 255 all around"),
    "a background of 65535": ([spots([300, 2, 3], ground=65535)], "no 0, and 65535 all around"),
    "a background of 1": ([spots([2, 3, 4], ground=1)], "no 0, and 1 all around: set the background to 0"),
    "nothing but background": ([np.full((64, 64), 255, np.uint8)], "the mask holds 0 and 255 only"),
    "borders of 255": ([ringed(255)], "0.png: the mask holds 1 to 4 and 255, which other tools write"),
    "one instance and a border": ([framed()], "1 to 1 and 255"),
    "background for foreground": ([inverted()] * 3, "all 3 masks hold the number 1 alone, as masks of foreground"),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
def test_masks_of_something_else_are_refused_and_nothing_is_written(
    case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    masks, message = CLASSES[case]
    assert prepare(tmp_path, masks) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error")]
    assert len(told) == 1 and message in told[0], told
    assert not (tmp_path / "out").exists()


INSTANCES: dict[str, list[Mask]] = {
    "in one piece": [spots([1, 2, 3, 4])] * 2,
    "any numbers": [spots([7, 40, 255, 3])] * 2,
    "exactly 255 of them": [np.kron(np.arange(256, dtype=np.uint8).reshape(16, 16), np.ones((10, 10), np.uint8))],
    "one an image": [spots([1]), spots([1], FOUR[2:])],
    "one an image, some in parts": [gland_mask()] * 2,
    "one number of one image": [spots([128])],
    "an image that is all gland": [np.ones((64, 64), np.uint8), spots([1, 2])],
    "16 bits": [spots([300, 2, 65535])],
}


@pytest.mark.parametrize("case", INSTANCES)
def test_masks_of_instances_are_taken(case: str, tmp_path: Path) -> None:
    masks = INSTANCES[case]
    assert prepare(tmp_path, masks) == 0
    rows = json.loads((tmp_path / "out" / "all.json").read_text())["annotations"]
    assert len(rows) == sum(len(np.unique(mask[mask > 0])) for mask in masks)


def test_made_up_glands_are_instances(tmp_path: Path) -> None:
    source = write_glands(tmp_path / "in", 2, 1, 80, 100, suffix=".png")
    assert main(["detect", "prepare", "glas", str(source), str(tmp_path / "out")]) == 0


def test_what_lies_in_several_places_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert prepare(tmp_path, [gland_mask()]) == 0
    assert "1 of 4 instances lie in several places, the first is 9 in 0.png" in caplog.text


@pytest.mark.parametrize("value", [1, 128, 255])
def test_parts_become_instances_where_that_is_asked_for(value: int, tmp_path: Path) -> None:
    mask = spots([value] * 3)
    assert prepare(tmp_path, [mask] * 2, "--apart", "split") == 0
    data = json.loads((tmp_path / "out" / "all.json").read_text())
    assert len(data["annotations"]) == 6 and data["info"]["apart"] == "split"
    assert {row["instance_id"] for row in data["annotations"]} == {1, 2, 3}


def test_black_and_white_masks_are_split(tmp_path: Path) -> None:
    assert prepare(tmp_path, [spots([1, 1, 1]) > 0], "--apart", "split") == 0
    assert len(json.loads((tmp_path / "out" / "all.json").read_text())["annotations"]) == 3


def test_numbers_are_instances_where_that_is_said(tmp_path: Path) -> None:
    assert prepare(tmp_path, [spots([1, 1, 1])] * 2, "--apart", "keep") == 0
    assert len(json.loads((tmp_path / "out" / "all.json").read_text())["annotations"]) == 2
