"""COCO files as exporters write them: the objects are read right, or the file is refused in one line."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ca2cl.detection.coco.files import align_categories, encode_mask, instance_ids, read_coco
from ca2cl.detection.coco.metrics import coco_scores
from ca2cl.detection.coco.validation import Notes, check_coco
from ca2cl.detection.engines.data import TrainingImages
from ca2cl.detection.predict.run import _truth
from ca2cl.errors import InputError
from tests.support.coco_files import CLASSES, PLACES, Json, coco, perfect_scores, write_split

WHOLE, APART = "\N{LATIN SMALL LETTER U WITH DIAERESIS}.png", "u\N{COMBINING DIAERESIS}.png"
Change = Callable[[Json], None]


def each(part: str, change: Callable[[int, Json], None]) -> Change:
    """A change of every row, by its number."""

    def all_rows(data: Json) -> None:
        for number, row in enumerate(data[part]):
            change(number, row)

    return all_rows


def drop(part: str, *names: str) -> Change:
    return each(part, lambda _, row: [row.pop(name, None) for name in names] and None)


def put(part: str, **fields: Any) -> Change:
    """Fields of every row; a function is given the row's number."""
    return each(part, lambda n, row: row.update({k: v(n) if callable(v) else v for k, v in fields.items()}))


def other_ids(data: Json) -> None:
    """The same classes under each other's ids."""
    data["categories"] = [{"id": 1, "name": "nerve"}, {"id": 2, "name": "gland"}]
    put("annotations", category_id=lambda n: 2 - n % 2)(data)


def text_ids(data: Json) -> None:
    put("images", id=lambda n: f"i{n}")(data)
    put("annotations", image_id=lambda n: f"i{n // 3}")(data)


def mixed_ids(data: Json) -> None:
    """Numbers and text in one list: numpy makes text of all."""
    data["images"][1]["id"] = "2"
    for row in data["annotations"][3:6]:
        row["image_id"] = "2"


def zero_images(data: Json) -> None:
    put("images", id=lambda n: n)(data)
    put("annotations", image_id=lambda n: n // 3)(data)


def zero_categories(data: Json) -> None:
    put("categories", id=lambda n: n)(data)
    put("annotations", category_id=lambda n: n % 2)(data)


def polygon(number: int) -> list[list[float]]:
    y, x = PLACES[number % 3]
    return [[x, y, x + 14, y, x + 14, y + 18, x, y + 18]]


def plain_counts(number: int) -> Json:
    y, x = PLACES[number % 3]
    first, last = 64 * x + y, 64 * (64 - x - 13) - y - 18
    return {"size": [64, 64], "counts": [first, *([18, 46] * 13), 18, last]}


def big_ids(data: Json) -> None:
    """Two ids that are one as floats."""
    put("annotations", id=lambda n: 2**60 + n)(data)


EMPTY = encode_mask(np.zeros((64, 64), bool))
FULL = {"size": [64, 64], "counts": [0, 64 * 64]}
RIGHT: dict[str, Change] = {
    "as it is": lambda data: None,
    "categories in another order": lambda data: data["categories"].reverse(),
    "categories under other ids": other_ids,
    "categories from 0": zero_categories,
    "a category that does not occur": lambda data: data["categories"].insert(0, {"id": 7, "name": "glands"}),
    "annotations numbered from 0": put("annotations", id=lambda n: n),
    "annotations numbered image by image": put("annotations", id=lambda n: n % 3),
    "annotations of one number": put("annotations", id=1),
    "annotations numbered by text": put("annotations", id=lambda n: f"a{n}"),
    "annotations of huge numbers": big_ids,
    "annotations without a number": drop("annotations", "id"),
    "images numbered from 0": zero_images,
    "images numbered by text": text_ids,
    "images numbered by both": mixed_ids,
    "numbers as floats": lambda data: [
        row.update({k: float(v) for k, v in row.items() if isinstance(v, int)})
        for part in ("images", "annotations", "categories") for row in data[part]
    ] and None,
    "no iscrowd": drop("annotations", "iscrowd"),
    "iscrowd as false": put("annotations", iscrowd=False),
    "iscrowd as null": put("annotations", iscrowd=None),
    "no area": drop("annotations", "area"),
    "area 0": put("annotations", area=0),
    "area below zero": put("annotations", area=-1),
    "area of the image": put("annotations", area=1e9),
    "no bbox": drop("annotations", "bbox"),
    "bbox as corners": each("annotations", lambda n, row: row["bbox"].__setitem__(
        slice(2, 4), [row["bbox"][0] + 14, row["bbox"][1] + 18])),
    "bbox of zeros": put("annotations", bbox=[0, 0, 0, 0]),
    "polygons": put("annotations", segmentation=polygon),
    "plain run lengths": put("annotations", segmentation=plain_counts),
    "instance_id of classes": put("annotations", instance_id=lambda n: 1 + n % 2),
    "instance_id from 0": put("annotations", instance_id=lambda n: n % 3),
    "instance_id as text": put("annotations", instance_id=lambda n: f"uuid-{n}"),
    "instance_id of one": put("annotations", instance_id=1),
    "info and licences": lambda data: data.update({"info": None, "licenses": "none", "year": 2020}),
    "an image without objects": lambda data: data["images"].append(
        {"id": 9, "file_name": "1b.png", "height": 64, "width": 64}),
    "file names of Windows": put("images", file_name=lambda n: f".\\{n + 1}.png"),
    "file names in folders": put("images", file_name=lambda n: f"./{n + 1}.png"),
    "exact copies": lambda data: data["annotations"].extend(copy.deepcopy(data["annotations"][:4])),
    "objects without a pixel": lambda data: data["annotations"].append(
        {"id": 90, "image_id": 1, "category_id": 1, "segmentation": EMPTY, "bbox": [1, 1, 0, 0]}),
    "a polygon between pixels": lambda data: data["annotations"].append(
        {"id": 91, "image_id": 1, "category_id": 1, "segmentation": [[50.1, 50.1, 50.3, 50.1, 50.2, 50.3]]}),
    "a crowd": lambda data: data["annotations"].append(
        {"id": 92, "image_id": 1, "category_id": 1, "iscrowd": 1, "segmentation": FULL}),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_a_perfect_detector_scores_1_however_the_file_is_written(case: str, tmp_path: Path) -> None:
    data = coco()
    RIGHT[case](data)
    if case == "an image without objects":
        (tmp_path / "valid").mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / "valid" / "1b.png")
    scores = perfect_scores(tmp_path, data)
    wanted = {name: 1.0 for name in scores if name != "hausdorff"} | {"hausdorff": 0.0}
    assert scores == pytest.approx(wanted) and {"box/AP", "mask/AP", "box/AP_small", "f1", "dice"} <= set(scores)


@pytest.mark.parametrize("case", RIGHT)
def test_the_objects_are_trained_on_alike_however_the_file_is_written(case: str, tmp_path: Path) -> None:
    data = coco()
    RIGHT[case](data)
    images = TrainingImages(write_split(tmp_path, "train", data), CLASSES, 1, 0, masks=True)
    truth = coco()["annotations"]
    for place, image in enumerate(images.images):
        rows, own = images.rows[image["id"]], truth[3 * place : 3 * place + 3]
        assert [CLASSES[row["label"]] for row in rows] == [CLASSES[row["category_id"] - 1] for row in own]
        assert [row["bbox"] for row in rows] == [row["bbox"] for row in own]
    assert len(images.images) == 3


def test_a_class_that_a_split_does_not_list_is_no_fault(tmp_path: Path) -> None:
    data = coco()
    data["categories"] = [{"id": 2, "name": "nerve"}]
    data["annotations"] = [row for row in data["annotations"] if row["category_id"] == 2]
    assert perfect_scores(tmp_path, data, rows=range(1, 9, 2))["box/AP"] == pytest.approx(1)


def test_a_class_that_the_detector_does_not_know_is_refused() -> None:
    data = check_coco(coco(), "x.json", Notes())
    with pytest.raises(InputError, match=r"x\.json: has the classes gland, nerve, not gland, vessel; give"):
        align_categories(data, ["gland", "vessel"], "x.json")


def test_one_class_in_place_of_another_is_no_perfect_score(tmp_path: Path) -> None:
    """What the scores above would be worth if classes did not count."""
    data = coco()
    put("annotations", category_id=lambda n: 2 - n % 2)(data)
    assert perfect_scores(tmp_path, data)["box/AP"] == 0


def first(part: str, **fields: Any) -> Change:
    return lambda data: data[part][0].update(fields)


WRONG: dict[str, tuple[Change, str]] = {
    "image ids twice": (put("images", id=1), "id 1 belongs to more than one image; give each its own"),
    "image ids twice as a float": (first("images", id=2.0), "id 2 belongs to more than one image"),
    "category ids twice": (put("categories", id=1), "id 1 belongs to more than one category"),
    "names twice": (put("categories", name="gland"), "category 2 has name 'gland', as 1 has"),
    "files twice": (put("images", file_name="1.png"), "image 2 has file_name '1.png', as 1 has"),
    "files twice by other words": (first("images", file_name=".\\2.png"), "image 2 has file_name '2.png', as 1 has"),
    "an unknown image": (first("annotations", image_id=77), "annotation 1 is of image 77, which is not listed"),
    "an image id as text": (first("annotations", image_id="1"), "annotation 1 is of image '1', which is not listed"),
    "an unknown category": (first("annotations", category_id=99), "has category_id 99, the categories are 1, 2"),
    "a fraction as id": (first("images", id=1.5), "image 1.5 has id 1.5, neither a number nor text"),
    "true as id": (first("annotations", image_id=True), "has image_id True"),
    "null as id": (first("categories", id=None), "category None has id None"),
    "no category": (drop("annotations", "category_id"), "number 1 of the annotations lacks category_id"),
    "no file": (drop("images", "file_name"), "number 1 of the images lacks file_name"),
    "no size": (drop("images", "height"), "number 1 of the images lacks height"),
    "a size of 0": (first("images", height=0), "has height 0 and width 64"),
    "a size of null": (first("images", width=None), "has height 64 and width None"),
    "a path of Windows": (first("images", file_name="..\\..\\x.png"), "is no path in the images' folder"),
    "an absolute path": (first("images", file_name="/data/x.png"), "is no path in the images' folder"),
    "an object without place": (drop("annotations", "segmentation", "bbox"), "has neither segmentation nor bbox"),
    "bbox of three": (first("annotations", bbox=[1, 2, 3]), r"annotation 1 has bbox \[1, 2, 3\], .*four numbers"),
    "bbox of text": (first("annotations", bbox=["1", 2, 3, 4]), "four numbers"),
    "bbox of NaN": (first("annotations", bbox=[float("nan"), 2, 3, 4]), "four numbers"),
    "bbox backwards": (first("annotations", bbox=[20, 20, -4, 5]), "with a side below zero"),
    "bbox elsewhere": (first("annotations", bbox=[640, 80, 14, 18], segmentation=[]), "1 lies outside of its image"),
    "iscrowd of 3": (first("annotations", iscrowd=3), "has iscrowd 3"),
    "run lengths of another image": (
        first("annotations", segmentation={"size": [32, 64], "counts": [2048]}), "has a segmentation that cannot be"),
    "a flat polygon": (first("annotations", segmentation=[1, 2, 3, 4, 5, 6]), r"no list \[x, y, x, y, ...\]"),
    "polygons of points": (first("annotations", segmentation=[[[1, 2], [3, 4], [5, 6]]]), "points"),
    "shares of the image": (
        put("annotations", segmentation=[], bbox=[0.1, 0.2, 0.25, 0.5]), "multiply shares of the"),
    "boxes as corners": (
        put("annotations", segmentation=None, bbox=lambda n: [20 + n, 20, 50 + n, 50]), "9 of 9 boxes reach beyond"),
    "polygons of shares": (
        put("annotations", segmentation=[[0.0, 0.0, 0.9, 0.0, 0.9, 0.9]], bbox=None), "multiply shares of the"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_can_be_read_in_two_ways_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    data = coco()
    change(data)
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=message) as caught:
        read_coco(tmp_path / "a.json")
    told = str(caught.value)
    assert told.startswith(f"{tmp_path / 'a.json'}: ") and "; " in told and told.isprintable()


def test_what_is_not_taken_as_it_stands_is_told_once_a_kind(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = coco()
    data["annotations"][0]["bbox"] = data["annotations"][5]["bbox"] = [40, 40, 5, 5]
    for case in ("exact copies", "objects without a pixel"):
        RIGHT[case](data)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with caplog.at_level(logging.WARNING):
        read_coco(path)
        assert not caplog.messages
        read_coco(path, warn=True)
    assert sorted(caplog.messages) == [
        f"{path}: 1 annotations have no pixel and are left out, first 90 of '1.png'",
        f"{path}: 3 annotations have a bbox that is not their segmentation's, which is taken instead, first 1 of "
        "'1.png'",
        f"{path}: 4 annotations are exact copies of others and are left out, first 1 of '1.png'",
    ]


def test_what_a_detector_found_is_read_as_it_stands() -> None:
    """``predictions.json`` is a COCO file, too: empty masks, and boxes that are not the masks'."""
    data = coco()
    RIGHT["objects without a pixel"](data)
    put("annotations", score=0.5, bbox=lambda n: [n, 0, 30.5, 20])(data)
    rows = check_coco(data, "x.json", Notes())["annotations"]
    assert [row["bbox"] for row in rows] == [row["bbox"] for row in data["annotations"]]


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(coco()), encoding="utf-8-sig")
    assert len(read_coco(tmp_path / "a.json")["annotations"]) == 9


def test_objects_without_segmentation_are_boxes(tmp_path: Path) -> None:
    data = coco()
    put("annotations", segmentation=[])(data)
    split = write_split(tmp_path, "train", data)
    assert TrainingImages(split, CLASSES, 1, 0, masks=False).rows[1][0]["area"] == 252
    with pytest.raises(InputError, match="annotation 1 has no segmentation; give it one, or use --head retinanet_fpn"):
        TrainingImages(split, CLASSES, 1, 0, masks=True)
    truth = read_coco(split.annotations)
    rows = [{**row, "score": 0.9} for row in truth["annotations"]]
    assert coco_scores(truth, rows)["box/AP"] == pytest.approx(1)
    with pytest.raises(InputError, match="annotations without segmentation"):
        coco_scores(truth, [{**row, "segmentation": encode_mask(np.ones((64, 64), bool))} for row in rows])


@pytest.mark.parametrize(
    ("listed", "on_disk"),
    [("sub/a.png", "sub/a.png"), ("sub\\a.png", "sub/a.png"), ("a\\b.png", "a\\b.png"), (WHOLE, APART), (APART, WHOLE)],
)
def test_an_image_is_found_under_its_name_as_other_systems_write_it(listed: str, on_disk: str, tmp_path: Path) -> None:
    split = write_split(tmp_path, "valid", coco())
    assert split.path({"file_name": listed}) == split.images / listed and not (split.images / listed).exists()
    (split.images / on_disk).parent.mkdir(exist_ok=True)
    (split.images / on_disk).touch()
    assert split.path({"file_name": listed}) == split.images / on_disk


def test_truth_is_matched_by_the_names_of_its_images(tmp_path: Path) -> None:
    data = coco()
    put("images", file_name=lambda n: f"C\\data/valid\\{n + 1}.png")(data)
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(data))
    images = [tmp_path / f"{number}.png" for number in (1, 2, 3)]
    assert [image["file_name"] for image in _truth(str(path), images)["images"]] == ["1.png", "2.png", "3.png"]
    put("images", file_name=lambda n: f"{n}/1.png")(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match="two of its images differ in their folders only"):
        _truth(str(path), images)


def test_an_instance_id_that_numbers_the_mask_is_kept() -> None:
    data = coco(1)
    put("annotations", instance_id=lambda n: (40, 7, 300)[n])(data)
    ids = instance_ids(data["images"][0], data["annotations"])
    assert [ids[y, x] for y, x in PLACES] == [40, 7, 300] and len(np.unique(ids)) == 4


IDS = st.one_of(st.integers(0, 2**62), st.text(min_size=1, max_size=4).filter(str.isprintable))


@settings(deadline=None, max_examples=25)
@given(
    images=st.lists(IDS, min_size=3, max_size=3, unique=True),
    categories=st.lists(IDS, min_size=2, max_size=2, unique=True),
    annotations=st.lists(st.one_of(st.none(), st.booleans(), st.floats(), IDS), min_size=9, max_size=9),
    order=st.permutations(range(9)),
    turned=st.booleans(),
)
def test_scores_do_not_depend_on_numbers_and_order(
    images: list[Any], categories: list[Any], annotations: list[Any], order: list[int], turned: bool
) -> None:
    """Any ids of images, categories and annotations, in any order."""
    data = coco()
    put("images", id=lambda n: images[n])(data)
    put("categories", id=lambda n: categories[n])(data)
    put("annotations", id=lambda n: annotations[n], image_id=lambda n: images[n // 3])(data)
    put("annotations", category_id=lambda n: categories[n % 2])(data)
    data["annotations"] = [data["annotations"][place] for place in order]
    if turned:
        data["categories"].reverse()
    truth = check_coco(data, "x.json", Notes())
    rows = [{**row, "score": 0.9} for row in truth["annotations"][:5]]
    plain = check_coco(coco(), "x.json", Notes())
    same = [{**plain["annotations"][place], "score": 0.9} for place in order[:5]]
    assert coco_scores(truth, rows) == pytest.approx(coco_scores(plain, same))
