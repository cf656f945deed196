"""Class-folder trees and Hugging Face datasets are listed as they are, and bad ones are refused in one line."""

from __future__ import annotations

import io
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ca2cl.data.sources.base import Source, SourceOptions, safe_key
from ca2cl.data.sources.choose import open_source
from ca2cl.data.sources.image_folder import EXTENSIONS
from ca2cl.data.sources.names import SLIDES
from ca2cl.errors import InputError
from ca2cl.slides.readers.open import PYRAMIDS


def encoded(seed: int, kind: str = "PNG", side: int = 8) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def put(root: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encoded(seed))


def everything(source: Source) -> list[Any]:
    return source.tiles(range(len(source)))


def test_nested_class_folders_are_labelled_by_the_first_folder(tmp_path: Path) -> None:
    put(tmp_path, "TUM/slide1/a.TIF", "TUM/b.jpeg", "ADI/c.webp", "ADI/deep/er/d.BMP")
    put(tmp_path, ".hidden/x.png", "ADI/.y.png", "__MACOSX/ADI/z.png")
    (tmp_path / "ADI/Thumbs.db").write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert source.classes == ["ADI", "TUM"]
    assert [(t.name, t.label, t.ext) for t in everything(source)] == [
        ("ADI/c.webp", 0, "webp"),
        ("ADI/deep/er/d.BMP", 0, "bmp"),
        ("TUM/b.jpeg", 1, "jpeg"),
        ("TUM/slide1/a.TIF", 1, "tif"),
    ]


def test_a_lone_folder_of_class_folders_is_stepped_into(tmp_path: Path) -> None:
    put(tmp_path / "NCT-CRC-HE-100K", "NCT-CRC-HE-100K/ADI/a.tif", "NCT-CRC-HE-100K/TUM/b.tif")
    source = open_source(str(tmp_path))
    assert source.classes == ["ADI", "TUM"] and source.name == tmp_path.name


SPLITS = [
    (["train/A/1.png", "train/B/2.png", "test/A/3.png", "test/B/4.png"], "test, train look like splits"),
    (["Training_set/1.png", "valid-256/2.png"], "look like splits"),  # no classes below them
    (["CRC-VAL-HE-7K/ADI/1.png", "CRC-VAL-HE-7K/TUM/2.png", "NCT/ADI/3.png", "NCT/STR/4.png", "NCT/TUM/5.png"],
     "each of CRC-VAL-HE-7K, NCT holds the class folders ADI, TUM"),
    (["fold1/A/1.png", "fold1/B/2.png", "fold2/A/3.png", "fold2/B/4.png"], "class folders A, B"),
    (["A/1.png", "B/2.png", "test/A/3.png", "test/B/4.png"], "test holds folders of the same names again"),
    ([f"{patient}/{label}/1.png" for patient in (8863, 8864, 8913) for label in (0, 1)], "class folders 0, 1"),
]  # fmt: skip
CLASSES = [
    ["TUM/slide1/a.png", "TUM/slide2/b.png", "STR/slide1/c.png", "STR/slide2/d.png"],
    ["TUM/TCGA-A1-22/a.png", "TUM/TCGA-B7-13/b.png", "STR/TCGA-A1-22/c.png", "STR/TCGA-B7-13/d.png"],
    ["TUM/1/a.png", "TUM/2/b.png", "STR/1/c.png", "STR/2/d.png"],
    ["TUM/aperio/a.png", "STR/aperio/b.png"],  # one name inside all
    ["test/a.png", "control/b.png"],  # a treatment
    ["grade1/s1/a.png", "grade1/s2/b.png", "grade2/s1/c.png", "grade2/s2/d.png"],
    ["0/a.png", "1/b.png"],
    ["TUM/x/a.png", "TUM/y/b.png", "TUM/c.png", "STR/x/d.png", "STR/y/e.png"],  # images beside the folders
]


@pytest.mark.parametrize(("names", "reason"), SPLITS)
def test_splits_and_data_sets_are_not_taken_for_classes(names: list[str], reason: str, tmp_path: Path) -> None:
    put(tmp_path, *names)
    with pytest.raises(InputError) as refused:
        open_source(str(tmp_path))
    message, first = str(refused.value), min(names).partition("/")[0]
    assert reason in message and f"`ca2cl shard {tmp_path}/{first} OUT/{first}`" in message, message
    insisted = open_source(str(tmp_path), SourceOptions(check_classes=False))
    assert insisted.classes == sorted({name.partition("/")[0] for name in names})
    assert open_source(str(tmp_path), SourceOptions(unlabelled=True)).classes == []
    assert open_source(str(tmp_path), mixed=True).classes == insisted.classes  # as embed lists it: labels do not matter


@pytest.mark.parametrize("names", CLASSES)
def test_slides_inside_classes_are_not_taken_for_classes(names: list[str], tmp_path: Path) -> None:
    put(tmp_path, *names)
    assert open_source(str(tmp_path)).classes == sorted({name.partition("/")[0] for name in names})


def test_a_single_class_is_not_stepped_into(tmp_path: Path) -> None:
    put(tmp_path, "TUM/a.png")
    assert open_source(str(tmp_path)).classes == ["TUM"]


def test_a_flat_folder_is_unlabelled(tmp_path: Path) -> None:
    put(tmp_path, "b.png", "a.png")
    source = open_source(str(tmp_path))
    assert source.classes == [] and source.labels.tolist() == [-1, -1]


def test_unlabelled_takes_no_classes_from_folders(tmp_path: Path) -> None:
    put(tmp_path, "s1/a.png", "s2/b.png", "c.png")
    source = open_source(str(tmp_path), SourceOptions(unlabelled=True))
    assert source.classes == [] and source.labels.tolist() == [-1] * 3


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "ADI/a.png", "preview.png")
    with pytest.raises(InputError, match=r"preview\.png.*ADI.*unlabelled"):
        open_source(str(tmp_path))


def test_slides_and_files_are_refused_with_what_to_give(tmp_path: Path) -> None:
    put(tmp_path, "tiles/ADI/a.jpg", "cohort/sub/b.SVS", "cohort/notes.txt", "cohort.csv")
    for name, words in {
        "cohort": "cohort: has .svs files: add --mpp 0.5 (micrometres a pixel) to cut tiles from slides",
        "cohort/sub/b.SVS": "b.SVS: slides, not tiles: add --mpp 0.5",
        "cohort/*.svs": "*.svs: slides, not tiles: add --mpp 0.5",
        "cohort.csv": "a CSV lists slides: add --mpp 0.5",
        "tiles/ADI/a.jpg": f"a file, not a folder; give the folder that holds it: {tmp_path}/tiles/ADI",
    }.items():
        with pytest.raises(InputError, match=re.escape(words)):
            open_source(str(tmp_path / name))
    assert SLIDES == PYRAMIDS - EXTENSIONS


@pytest.mark.parametrize("make", [False, True])
def test_missing_and_empty_folders_are_refused(tmp_path: Path, make: bool) -> None:
    folder = tmp_path / "none"
    if make:
        (folder / "ADI").mkdir(parents=True)
    with pytest.raises(InputError, match="none: no"):
        open_source(str(folder))


def test_a_link_to_a_parent_is_refused_and_a_link_elsewhere_followed(tmp_path: Path) -> None:
    put(tmp_path, "real/a.png", "set/ADI/b.png")
    (tmp_path / "set/TUM").symlink_to(tmp_path / "real")
    assert open_source(str(tmp_path / "set")).classes == ["ADI", "TUM"]
    (tmp_path / "set/ADI/loop").symlink_to(tmp_path / "set")
    with pytest.raises(InputError, match="loop"):
        open_source(str(tmp_path / "set"))


def test_group_pattern_takes_its_first_group_or_the_whole_match(tmp_path: Path) -> None:
    put(tmp_path, "ADI/TCGA-AB-1_1.png", "TUM/other.png")
    source = open_source(str(tmp_path), SourceOptions(group_pattern=r"TCGA-(\w\w)"))
    assert [t.group for t in everything(source)] == ["AB", None]
    source = open_source(str(tmp_path), SourceOptions(group_pattern=r"TCGA-\w\w"))
    assert [t.group for t in everything(source)] == ["TCGA-AB", None]
    assert list(source.ungrouped) == [1]


def test_an_empty_group_is_none(tmp_path: Path) -> None:
    """Otherwise all such tiles would be tiles of one slide."""
    put(tmp_path, "ADI/AB_1.png", "ADI/_1.png", "TUM/_2.png")
    source = open_source(str(tmp_path), SourceOptions(group_pattern=r"/(\w*?)_"))
    assert [t.group for t in everything(source)] == ["AB", None, None]
    assert list(source.ungrouped) == [1, 2]


@pytest.mark.parametrize("pattern", ["(", "nowhere"])
def test_a_useless_group_pattern_is_refused(tmp_path: Path, pattern: str) -> None:
    put(tmp_path, "ADI/a.png")
    with pytest.raises(InputError, match="group_pattern"):
        open_source(str(tmp_path), SourceOptions(group_pattern=pattern))


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",)), min_size=1), unique=True))
@settings(deadline=None, max_examples=200)
def test_keys_are_one_to_one_and_have_no_dot_or_slash(names: list[str]) -> None:
    keys = {safe_key(name) for name in names}
    assert len(keys) == len(names)
    assert not any(set(key) & set("./ ") for key in keys)


def test_same_stem_with_two_extensions_gives_two_keys(tmp_path: Path) -> None:
    put(tmp_path, "ADI/a.png", "ADI/a.tif", "ADI/a.png.tif")
    assert len({t.key for t in everything(open_source(str(tmp_path)))}) == 3


def test_digest_follows_names_and_content(tmp_path: Path) -> None:
    put(tmp_path, "ADI/a.png", "TUM/b.png")
    before = open_source(str(tmp_path)).digest
    assert open_source(str(tmp_path)).digest == before
    (tmp_path / "TUM/b.png").write_bytes(encoded(7, side=9))
    assert open_source(str(tmp_path)).digest != before


@pytest.fixture
def images() -> list[dict[str, Any]]:
    return [{"bytes": encoded(seed, kind), "path": None} for seed, kind in enumerate(["PNG", "JPEG", "TIFF", "PNG"])]


def save(root: Path, columns: dict[str, Any], **features: Any) -> str:
    import datasets

    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    for name, feature in features.items():
        dataset = dataset.cast_column(name, feature)
    dataset.save_to_disk(str(root))
    return str(root)


def test_dataset_with_class_labels_and_groups(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    import datasets

    names = datasets.ClassLabel(names=["ADI", "BACK", "TUM"])
    columns = {"image": images, "label": [2, 0, -1, 2], "slide": ["s1", "s1", None, "s2"]}
    path = save(tmp_path / "d", columns, label=names)
    source = open_source(path, SourceOptions(group_column="slide"))
    assert source.classes == ["ADI", "BACK", "TUM"] and source.labels.tolist() == [2, 0, -1, 2]
    tiles = everything(source)
    assert [source.reader.read(tile) for tile in tiles] == [image["bytes"] for image in images]
    assert [tile.group for tile in tiles] == ["s1", "s1", None, "s2"] and list(source.ungrouped) == [2]
    assert len({tile.key for tile in tiles}) == 4
    assert open_source(path).digest != source.digest  # other groups, other shards
    moved = shutil.copytree(path, tmp_path / "elsewhere")
    assert open_source(str(moved)).digest == open_source(path).digest
    state = moved / "state.json"
    state.write_text(re.sub(r'("_fingerprint": ")\w+', r"\g<1>0123456789abcdef", state.read_text()))
    assert open_source(str(moved)).digest != open_source(path).digest  # what datasets says of other rows


@pytest.mark.parametrize("typed", [True, False], ids=["images", "bytes"])
def test_parquet_files_are_a_data_set(
    tmp_path: Path, images: list[dict[str, Any]], typed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As public sets of tiles are published: one file, or files named after their splits."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    columns = {"image": images, "label": ["b", "a", "b", "a"], "slide": ["s1", "s1", "s2", "s2"]}
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    for name, rows in (("train-00000-of-00002", [0]), ("train-00001-of-00002", [1, 2]), ("test-00000-of-00001", [3])):
        part = {key: [values[row] for row in rows] for key, values in columns.items()}
        if typed:
            dataset = datasets.Dataset.from_dict(part).cast_column("image", datasets.Image())
            dataset.to_parquet(folder / f"{name}.parquet")
        else:
            part["image"] = [one["bytes"] for one in part["image"]]
            pq.write_table(pa.table(part), folder / f"{name}.parquet")
    source = open_source(str(tmp_path / "set"), SourceOptions(split="train", group_column="slide"))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, 0, 1]
    assert [source.reader.read(tile) for tile in everything(source)] == [one["bytes"] for one in images[:3]]
    assert [tile.group for tile in everything(source)] == ["s1", "s1", "s2"]
    alone = open_source(str(folder / "test-00000-of-00001.parquet"))
    assert [alone.reader.read(tile) for tile in everything(alone)] == [images[3]["bytes"]]
    with pytest.raises(InputError, match="choose one of (train, test|test, train) with --split"):
        open_source(str(tmp_path / "set"))
    (folder / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be loaded as a dataset"):
        open_source(str(folder / "test-00000-of-00001.parquet"))


def test_what_is_empty_or_not_a_number_is_no_slide(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    columns = {"image": images, "label": [0, 0, 1, 1], "slide": [1.0, math.nan, None, 2.0], "name": ["a", "", "", "b"]}
    path = save(tmp_path / "d", columns)
    for column, expected in (("slide", ["1.0", None, None, "2.0"]), ("name", ["a", None, None, "b"])):
        source = open_source(path, SourceOptions(group_column=column))
        assert [tile.group for tile in everything(source)] == expected and list(source.ungrouped) == [1, 2]


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [([7, 3, None, 7], ["3", "7"], [1, 0, -1, 1]), (["b", "a", "b", None], ["a", "b"], [1, 0, 1, -1])],
)
def test_dataset_with_integer_or_string_labels(
    tmp_path: Path, images: list[dict[str, Any]], values: list[Any], classes: list[str], labels: list[int]
) -> None:
    source = open_source(save(tmp_path / "d", {"image": images, "label": values}))
    assert source.classes == classes and source.labels.tolist() == labels


@pytest.mark.parametrize("form", ["torch", "numpy", "pandas", "polars", "arrow", "python"])
@pytest.mark.parametrize("columns", [None, ["image"], ["label"]])
def test_a_saved_format_changes_nothing(
    tmp_path: Path, images: list[dict[str, Any]], form: str, columns: list[str] | None
) -> None:
    """Labels as tensors are no key of a table of classes; a format of some columns hides the others."""
    import datasets

    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["ADI", "TUM"]), slide=datasets.Value("int64")
    )
    plain = datasets.Dataset.from_dict({"image": images[:3], "label": [1, 0, 1], "slide": [7, 7, 8]}, features=features)
    try:
        plain.with_format(form, columns=columns).save_to_disk(tmp_path / "data")
    except ValueError:
        pytest.skip(f"{form} is not installed")
    source = open_source(str(tmp_path / "data"), SourceOptions(group_column="slide"))
    assert source.classes == ["ADI", "TUM"] and source.labels.tolist() == [1, 0, 1]
    assert [tile.group for tile in everything(source)] == ["7", "7", "8"]
    assert [source.reader.read(tile) for tile in everything(source)] == [image["bytes"] for image in images[:3]]


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        ([1.0, None, 0.0], ["0", "1"], [1, -1, 0]),
        ([2.0, float("nan"), 2.0], ["2"], [0, -1, 0]),
        (["b", None, "a"], ["a", "b"], [1, -1, 0]),
        ([True, False, True], ["False", "True"], [1, 0, 1]),
        ([None, None, None], [], [-1, -1, -1]),
    ],
)
def test_labels_may_be_missing(
    tmp_path: Path, images: list[dict[str, Any]], labels: list[Any], classes: list[str], numbers: list[int]
) -> None:
    import datasets

    datasets.Dataset.from_dict({"img": images[:3], "label": labels}).save_to_disk(tmp_path / "data")
    source = open_source(str(tmp_path / "data"), SourceOptions(image_column="img"))
    assert (source.classes, source.labels.tolist()) == (classes, numbers)


@pytest.mark.parametrize("labels", [[0.5, 1.0, 0.0], [[0], [1], [0, 1]], [{"a": 1}] * 3])
def test_labels_of_other_kinds_are_refused(tmp_path: Path, images: list[dict[str, Any]], labels: list[Any]) -> None:
    import datasets

    datasets.Dataset.from_dict({"img": images[:3], "label": labels}).save_to_disk(tmp_path / "data")
    with pytest.raises(InputError, match="label column 'label' holds .*integers or strings"):
        open_source(str(tmp_path / "data"), SourceOptions(image_column="img"))


def test_a_label_beyond_the_classes_is_refused(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    import datasets

    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    plain = datasets.Dataset.from_dict({"image": images[:3], "label": [0, 1, 5]}, features=features)
    names = datasets.ClassLabel(names=["ADI", "TUM"])
    table = plain.data.table
    named = datasets.Dataset(
        datasets.table.InMemoryTable(table.replace_schema_metadata()),
        datasets.DatasetInfo(features=datasets.Features(image=datasets.Image(), label=names)),
    )
    named.save_to_disk(tmp_path / "data")
    with pytest.raises(InputError, match="holds 5 in row 2, which is none of its 2 classes"):
        open_source(str(tmp_path / "data"))


def test_another_split_than_the_saved_one_is_refused(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    import datasets

    plain = datasets.Dataset.from_dict({"img": images[:3]}, split=datasets.NamedSplit("train"))
    plain.save_to_disk(tmp_path / "data")
    assert len(open_source(str(tmp_path / "data"), SourceOptions(image_column="img", split="train"))) == 3
    with pytest.raises(InputError, match="split is 'test', but this is the split 'train' alone"):
        open_source(str(tmp_path / "data"), SourceOptions(image_column="img", split="test"))


def test_dataset_splits_and_columns_must_exist(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    import datasets

    dataset = datasets.Dataset.from_dict({"image": images, "label": [0.5] * 4}).cast_column("image", datasets.Image())
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(str(tmp_path))
    cases = [
        (SourceOptions(), "split.*train, test"),
        (SourceOptions(split="x"), "split.*train, test"),
        (SourceOptions(split="test", image_column="x"), "image_column is 'x'.*image, label"),
        (SourceOptions(split="test", label_column="x"), "label_column is 'x'"),
        (SourceOptions(split="test", group_column="x", unlabelled=True), "group_column is 'x'"),
        (SourceOptions(split="test"), "integers or strings"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            open_source(str(tmp_path), options)
    assert len(open_source(str(tmp_path), SourceOptions(split="test", unlabelled=True))) == 4


def test_a_damaged_dataset_is_refused(tmp_path: Path, images: list[dict[str, Any]]) -> None:
    path = save(tmp_path / "d", {"image": images})
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"")
    with pytest.raises(InputError, match="cannot be loaded"):
        open_source(path)
