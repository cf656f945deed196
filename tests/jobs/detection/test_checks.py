"""What a training and its scoring would stumble over is found before the first step: files, classes, images."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from ca2cl.cli import main
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.train.split_checks import check_splits
from ca2cl.errors import InputError
from tests.support.coco_files import Json, coco, write_split


def _json(name: str, change: Callable[[Json], object]) -> Callable[[Path], None]:
    def rewrite(root: Path) -> None:
        data = json.loads((root / f"{name}.json").read_text())
        change(data)
        (root / f"{name}.json").write_text(json.dumps(data))

    return rewrite


def _crowds(data: Json) -> None:
    for row in data["annotations"]:
        row["iscrowd"] = 1


def _without_nerves(data: Json) -> None:
    data["annotations"] = [row for row in data["annotations"] if row["category_id"] == 1]


def _cut(path: str) -> Callable[[Path], None]:
    def cut(root: Path) -> None:
        whole = (root / path).read_bytes()
        (root / path).write_bytes(whole[: len(whole) - 30])

    return cut


def _turn(path: str, orientation: int) -> Callable[[Path], None]:
    def turn(root: Path) -> None:
        exif = Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (64, 64)).save(root / path, exif=exif)

    return turn


def _resize(path: str) -> Callable[[Path], None]:
    return lambda root: Image.new("RGB", (64, 48)).save(root / path)


def _link_away(root: Path) -> None:
    (root / "valid/2.png").unlink()
    (root / "valid/2.png").symlink_to("away")


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing to score": (_json("valid", lambda data: data["annotations"].clear()), "valid.json: has no instance to"),
    "crowds alone to score": (_json("valid", _crowds), "valid.json: has no instance to score on"),
    "nothing to train on": (_json("train", _crowds), "train.json: has no instance to train on"),
    "a class that is not trained": (_json("train", _without_nerves), "valid.json: has instances of the class 'nerve'"),
    "a class of another set": (
        _json("valid", lambda data: data["categories"][1].update(name="vessel")),
        "valid.json: has the classes gland, vessel, not gland, nerve; give splits of one",
    ),
    "an unknown category": (
        _json("valid", lambda data: data["annotations"][3].update(category_id=9)),
        "valid.json: annotation 4 has category_id 9, the categories are 1, 2",
    ),
    "an object without a mask": (
        _json("valid", lambda data: data["annotations"][3].update(segmentation=[])),
        "valid.json: annotation 4 has no segmentation; give it one, or use --head retinanet_fpn",
    ),
    "an image away": (lambda root: (root / "valid/2.png").unlink(), "No such file .* as image 2: restore"),
    "a link to nowhere": (_link_away, "valid/2.png: No such file"),
    "a training image away": (lambda root: (root / "train/2.png").unlink(), "train/2.png: No such file"),
    "a name in a folder too many": (
        _json("valid", lambda data: data["images"][0].update(file_name="valid/1.png")),
        "give file_name as its path in the split's folder",
    ),
    "an image cut off": (_cut("valid/3.png"), "valid/3.png: does not decode"),
    "a training image that is none": (lambda root: (root / "train/3.png").write_text("no"), "train/3.png: does not"),
    "an image of another size": (_resize("valid/1.png"), "valid/1.png: 48 x 64 pixels, expected 64 x 64; res"),
    "a training image of another size": (_resize("train/1.png"), "train/1.png: 48 x 64 pixels, expected 64 x 64"),
    "an image to be turned": (_turn("valid/1.png", 3), r"1.png: says .* orientation 3\).* save it upright"),
    "a training image to be turned": (_turn("train/2.png", 6), "train/2.png: says that it is to be shown turned"),
}  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split in ("train", "valid"):
        write_split(tmp_path / "data", split, coco())
    return tmp_path / "data"


def check(root: Path, masks: bool = True) -> None:
    check_splits({name: CocoSplit.of(root, name) for name in ("train", "valid")}, masks=masks)


@pytest.mark.parametrize("case", WRONG)
def test_what_would_be_met_later_is_refused_at_once(case: str, data: Path) -> None:
    check(data)
    change, message = WRONG[case]
    change(data)
    with pytest.raises(InputError, match=message) as caught:
        check(data)
    assert str(caught.value).isprintable()


def test_what_no_detector_needs_is_no_fault(data: Path) -> None:
    """A training image without instances that is away, an image of no split, a class that nobody annotated."""
    _json("train", lambda d: d["images"].append({"id": 9, "file_name": "no.png", "height": 8, "width": 8}))(data)
    _json("train", lambda d: d["categories"].append({"id": 3, "name": "vessel"}))(data)
    (data / "valid" / "notes.txt").write_text("x")
    check(data)
    _json("valid", lambda d: [row.update(segmentation=None) for row in d["annotations"]])(data)
    check(data, masks=False)


def test_a_refused_start_trains_nothing_and_leaves_no_folder(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (data / "valid" / "2.png").unlink()
    words = ["detect", "--encoder", "random", "--against", "[]", "--dataset", "coco", "--data", str(data), "--engine"]
    words += ["torchvision", "--iterations", "1", "--train_sides", "64", "--test_side", "64", "--output_dir"]
    assert main([*words, str(tmp_path / "job"), "--tracking.root", str(tmp_path / "store")]) == 2
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error")]
    assert len(told) == 1 and "valid/2.png: No such file" in told[0]
    assert not (tmp_path / "job").exists()


def test_what_is_mended_is_told(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    _json("valid", lambda d: d["annotations"][0].update(bbox=[0, 0, 1, 1]))(data)
    check(data)
    assert caplog.messages == [
        f"{data / 'valid.json'}: 1 annotations have a bbox that is not their segmentation's, which is taken instead, "
        "first 1 of '1.png'"
    ]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_images_of_every_format_may_be_noted_to_be_turned(kind: str, data: Path) -> None:
    exif, content = Image.Exif(), io.BytesIO()
    exif[274] = 6
    Image.new("RGB", (64, 64)).save(content, kind, exif=exif)
    (data / "valid" / "1.png").write_bytes(content.getvalue())  # its bytes tell, not its name
    with pytest.raises(InputError, match="EXIF orientation 6"):
        check(data)
