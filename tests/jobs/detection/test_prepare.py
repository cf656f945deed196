"""``ca2cl detect prepare``: COCO files give the masks back, splits and patients stay, bad archives are one line."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ca2cl.cli import main
from ca2cl.data.decode import decode
from ca2cl.detection.coco.files import decode_mask, encode_mask, instance_ids, read_coco
from ca2cl.detection.coco.fragment_rule import FragmentRule
from ca2cl.detection.coco.instances import Dropped, find_instances
from ca2cl.detection.coco.preview import shown_images
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.errors import InputError
from tests.support.gland_images import write_glands
from tests.support.glands import Mask, disc, gland_mask, save_pair, write_crag, write_pairs
from tests.support.jobs import ROOT

GLAS = ROOT.parent / "shared" / "data" / "glas"


def prepared(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the verb prints when all goes well."""
    code = main(["detect", "prepare", *map(str, arguments)])
    out, error = capfd.readouterr()
    assert code == 0, error
    return out


def mask_of(path: Path) -> Mask:
    return np.asarray(Image.open(path)).astype(np.int64)


@pytest.fixture(scope="module")
def glas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The challenge's archive in small, a folder within the folder that it was unzipped to."""
    root = tmp_path_factory.mktemp("glas")
    write_glands(root / "Warwick QU Dataset", 11, 2, 96, 128)
    return root


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_pairs(tmp_path / "in", ["a", "b"])


@pytest.mark.parametrize("suffix", [".bmp", ".png"])
def test_glas_comes_back_exactly_with_its_splits_and_patients(
    suffix: str, glas: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    archive = glas / "Warwick QU Dataset"
    if suffix == ".png":
        archive = write_glands(tmp_path / "png", 11, 2, 96, 128, suffix=suffix)
    out = tmp_path / "out"
    told = prepared(capfd, "glas", archive.parent if suffix == ".bmp" else archive, out, "--min_area", 0)
    assert told.splitlines()[0].startswith("train: 11 images of 11 patients, ")
    assert sorted(path.name for path in out.iterdir()) == ["testA", "testA.json", "train", "train.json"]
    train, test = (read_coco(out / f"{split}.json") for split in ("train", "testA"))
    names = [image["file_name"] for image in train["images"]]
    assert names == [f"train_{number}{suffix}" for number in range(1, 12)]  # 2 before 10
    assert [(image["patient_id"], image["grade"]) for image in test["images"]] == [("12", "benign"), ("13", "benign")]
    assert all(image["grade_2015"] == "healthy" for image in test["images"])
    for split, data in (("train", train), ("testA", test)):
        assert [row["id"] for row in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
        for image in data["images"]:
            assert (out / split / image["file_name"]).read_bytes() == (archive / image["file_name"]).read_bytes()
            source = mask_of(archive / image["file_name"].replace(suffix, f"_anno{suffix}"))
            assert np.array_equal(instance_ids(image, data["annotations"]), source)  # IoU 1 of every instance


def test_annotations_hold_boxes_areas_holes_and_parts(pairs: Path, tmp_path: Path) -> None:
    assert main(["detect", "prepare", "masks", str(pairs), str(tmp_path / "out")]) == 0
    data = read_coco(tmp_path / "out" / "all.json")
    assert [row["instance_id"] for row in data["annotations"]] == [3, 7, 9, 20] * 2
    assert [row["image_id"] for row in data["annotations"]] == [1] * 4 + [2] * 4
    source = gland_mask()
    for row in data["annotations"][:4]:
        own = source == row["instance_id"]
        assert np.array_equal(decode_mask(row["segmentation"], *own.shape), own)
        y, x = np.nonzero(own)
        assert row["bbox"] == [x.min(), y.min(), x.max() - x.min() + 1, y.max() - y.min() + 1]
        assert row["area"] == own.sum() and row["iscrowd"] == 0 and row["category_id"] == 1
    assert source[20, 20] == 0 and source[20, 10] == 3  # the hole is one, and the two parts of 9 are one instance
    assert data["categories"][0]["name"] == "gland"


def test_pycocotools_and_torchvision_read_the_file(pairs: Path, tmp_path: Path) -> None:
    from torchvision.datasets import CocoDetection

    assert main(["detect", "prepare", "masks", str(pairs), str(tmp_path / "out")]) == 0
    split = CocoSplit.of(tmp_path / "out", "all")
    image, rows = CocoDetection(str(split.images), str(split.annotations))[1]
    assert image.size == (80, 60) and len(rows) == 4
    with pytest.raises(InputError, match="no split test, there are: all"):
        CocoSplit.of(tmp_path / "out", "test")


def test_crag_keeps_its_splits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prepared(capfd, "crag", write_crag(tmp_path / "in"), tmp_path / "out")
    names = {
        split: [image["file_name"] for image in read_coco(tmp_path / "out" / f"{split}.json")["images"]]
        for split in ("train", "valid")
    }
    assert names == {"train": ["train_1.png", "train_2.png", "train_10.png"], "valid": ["test_1.png"]}
    assert not any("patient_id" in image for image in read_coco(tmp_path / "out" / "train.json")["images"])


def test_masks_of_any_folders_and_16_bit_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = gland_mask(np.uint16)
    ids[ids == 9] = 40_009
    for split, patient in (("fold2", 1), ("fold10", 2)):
        save_pair(
            tmp_path / "in" / split / "tiles" / "x.jpg", tmp_path / "in" / split / "Labels" / "x.tif", ids, patient
        )
    (tmp_path / "in" / "patients.csv").write_text("Name,Patient\nfold2/x,P1\nfold10/x.jpg,P2\n")
    told = prepared(capfd, "masks", tmp_path / "in", tmp_path / "out", "--images", "tiles", "--masks", "labels")
    assert [line.partition(":")[0] for line in told.partition("\n\n")[0].splitlines()] == ["fold2", "fold10"]
    for split, patient in (("fold2", "P1"), ("fold10", "P2")):
        data = read_coco(tmp_path / "out" / f"{split}.json")
        assert data["images"][0]["patient_id"] == patient
        assert np.array_equal(instance_ids(data["images"][0], data["annotations"]), ids)


def test_the_same_archive_gives_the_same_bytes(pairs: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "in"
    shutil.copytree(pairs, moved)
    contents = []
    for source, out in ((pairs, "one"), (moved, "two")):
        sheet = tmp_path / f"{out}.png"
        assert main(["detect", "prepare", "masks", str(source), str(tmp_path / out), "--preview", str(sheet)]) == 0
        contents.append({path.name: path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()})
        contents[-1]["sheet"] = sheet.read_bytes()
    assert contents[0] == contents[1]


def test_fragments_go_by_the_rule() -> None:
    ids = np.zeros((100, 100), np.int64)
    disc(ids, 1, 40, 40, 30)  # 2,821 pixels: up to 28 may go
    ids[0, 90:99] = ids[5, 90:99] = 1  # 9 + 9: both go
    ids[10, 90:99] = ids[10, 80:90] = 1  # 19 in a row: too much with the others
    ids[90, 0:8] = 2  # an instance of 8
    ids[80:90, 80:90], ids[95, 95:98] = 3, 3  # 100 pixels, and a part of 3, which is above 1 % of 103
    dropped = Dropped()
    found = find_instances(ids, FragmentRule(min_area=20, max_loss=0.01), dropped)
    assert [one.number for one in found] == [1, 3]
    assert dropped == Dropped(instances=1, fragments=2, pixels=8 + 18)
    source = ids == 1
    assert found[0].area == source.sum() - 18 and found[0].area / source.sum() >= 0.99
    assert (found[0].y, found[0].x, *found[0].mask.shape) == (10, 10, 61, 89)  # row 0 and 5 no longer stretch the box
    assert found[1].area == 103
    everything = Dropped()
    assert sum(one.area for one in find_instances(ids, FragmentRule(0, 0), everything)) == (ids > 0).sum()
    assert everything == Dropped()


def test_parts_that_touch_at_a_corner_are_one() -> None:
    ids = np.zeros((40, 40), np.int64)
    ids[0:20, 0:20], ids[20:22, 20:22] = 1, 1
    dropped = Dropped()
    (one,) = find_instances(ids, FragmentRule(), dropped)
    assert one.area == 404 and dropped == Dropped()


def test_what_was_dropped_is_in_the_file_and_on_the_screen(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ids = gland_mask()
    ids[0:3, 60:63], ids[58, 2] = 30, 3
    save_pair(tmp_path / "in" / "images" / "a.png", tmp_path / "in" / "masks" / "a.png", ids)
    told = prepared(capfd, "masks", tmp_path / "in", tmp_path / "out")
    assert (
        told.partition("\n\n")[0] + "\n"
        == "all: 1 images, 4 instances (dropped as too small: 1 instances, 1 fragments, 10 pixels)\n"
    )
    info = read_coco(tmp_path / "out" / "all.json")["info"]
    assert info["dropped"] == {"instances": 1, "fragments": 1, "pixels": 10}
    assert info["fragment_rule"] == {"min_area": 64, "max_loss": 0.01}


def test_the_preview_shows_every_split(glas: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    sheet = out / "preview.png"  # beside the data, where nothing is yet when the verb starts
    assert f"preview in {sheet}" in prepared(capfd, "glas", glas, out, "--preview", sheet)
    pixels = decode(sheet.read_bytes())
    assert pixels.shape[1] == 1440 and pixels.shape[0] > 700  # three rows: ten of train and both of testA
    yellow = (pixels[..., 0] > 230) & (pixels[..., 1] > 200) & (pixels[..., 2] < 60)
    assert yellow.sum() > 500  # outlines; made-up tissue has no such colour


def test_the_preview_spreads_over_splits_and_takes_no_image_twice() -> None:
    sizes = {"train": 30, "testA": 2, "testB": 9}
    splits = {
        split: {"images": [{"file_name": str(number)} for number in range(size)]} for split, size in sizes.items()
    }
    chosen = [(split, int(image["file_name"])) for split, image in shown_images(splits)]
    assert chosen == [
        *(("train", number) for number in (0, 7, 14, 22, 29)),
        *(("testA", number) for number in (0, 1)),
        *(("testB", number) for number in (0, 2, 4, 6, 8)),
    ]


def test_an_image_without_glands_stays_as_one(pairs: Path, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(pairs / "masks" / "a.png")
    assert main(["detect", "prepare", "masks", str(pairs), str(tmp_path / "out")]) == 0
    data = read_coco(tmp_path / "out" / "all.json")
    assert len(data["images"]) == 2 and {row["image_id"] for row in data["annotations"]} == {2}


def _write(name: str, content: bytes | Mask | Image.Image) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        path = root / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            (content if isinstance(content, Image.Image) else Image.fromarray(content)).save(path)

    return change


def _half(root: Path) -> None:
    content = io.BytesIO()
    Image.effect_noise((80, 60), 50).convert("RGB").save(content, "png")
    (root / "images" / "a.png").write_bytes(content.getvalue()[:1000])


def _all_black(root: Path) -> None:
    for path in (root / "masks").iterdir():
        _write(f"masks/{path.name}", np.zeros((60, 80), np.uint8))(root)


ids_8 = gland_mask()
BAD_PAIRS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no masks": (lambda root: shutil.rmtree(root / "masks"), "no folder images beside a folder masks"),
    "an image without a mask": (lambda root: (root / "masks" / "b.png").unlink(), "b.png: has no mask"),
    "a mask without an image": (lambda root: (root / "images" / "b.png").unlink(), "b.png: a mask without its image"),
    "no images": (lambda root: [path.unlink() for path in (root / "images").iterdir()], "images: no images here"),
    "another size": (_write("masks/a.png", ids_8[:-1]), "a.png: the mask is 59 x 80 pixels, its image 60 x 80"),
    "colour": (_write("masks/a.png", np.stack([ids_8] * 3, 2)), "a.png: the mask is RGB"),
    "transparent": (_write("masks/a.png", np.stack([ids_8] * 2, 2)), "a.png: the mask is LA"),
    "one bit": (_write("masks/a.png", ids_8 > 0), "black and white (1 bit)"),
    "0 and 255": (_write("masks/a.png", np.where(ids_8 > 0, np.uint8(255), np.uint8(0))), "0 and 255 only"),
    "not whole": (_write("masks/a.tif", ids_8 / np.float32(2)), "a.tif: a.png has the same name"),
    "JPEG": (lambda root: (root / "masks" / "a.png").rename(root / "masks" / "a.jpg"), "a.jpg: .jpg may change"),
    "no image in it": (_write("masks/a.png", b"nothing"), "a.png: the mask does not decode (not a whole PNG"),
    "cut-off image": (_half, "a.png: does not decode"),
    "black masks": (_all_black, "no instance in all of all"),
    "a table of others": (_write("index.csv", b"name,patient_id\nc,1\n"), "index.csv: has no row for a"),
    "no table": (_write("index.csv", b"a;b\n1;2\n"), "index.csv: needs the column name"),
    "two answers": (_write("Grade.csv", b"name,patient ID\na,1\na,2\n"), "two rows for a that differ"),
    "no text": (_write("Grade.csv", b"name,patient\na,\xff\n"), "not a table of comma-separated UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_bad_pairs_are_one_line_and_nothing_is_written(
    case: str, pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD_PAIRS[case]
    spoil(pairs)
    refused(capfd, message, "masks", pairs, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def refused(capfd: pytest.CaptureFixture[str], message: str, *arguments: object) -> None:
    code = main(["detect", "prepare", *map(str, arguments)])
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error")]
    assert code == 2 and message in line, line


def test_masks_of_fractions_and_below_zero(pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (pairs / "masks" / "a.png").unlink()
    for ids, message in ((ids_8 / np.float32(2), "holds fractions"), (ids_8.astype(np.int32) - 1, "holds -1")):
        Image.fromarray(ids).save(pairs / "masks" / "a.tif")
        refused(capfd, message, "masks", pairs, tmp_path / "out")


def test_bad_usage_and_places(pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    refused(capfd, "did you mean glas?", "glass", pairs, out)
    refused(capfd, "no such folder", "glas", tmp_path / "nowhere", out)
    refused(capfd, "no image is named as in GlaS", "glas", pairs, out)
    refused(capfd, "no image is named as in GlaS", "glas", tmp_path / "empty", out)
    refused(capfd, "no train/Images beside train/Annotation", "crag", pairs, out)
    refused(capfd, "min_area is -1", "masks", pairs, out, "--min_area=-1")
    refused(capfd, "max_loss is 1.0", "masks", pairs, out, "--max_loss", 1)
    refused(capfd, "give the name of a .png", "masks", pairs, out, "--preview", "x.jpg")
    refused(capfd, "give a folder's name", "masks", pairs, out, "--images", "a/b")
    refused(capfd, "not an empty folder", "masks", pairs, pairs)
    refused(capfd, "cannot be written", "masks", pairs, tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "in"]
    refused(capfd, f"{out} is complete", "masks", pairs, out, "--preview", tmp_path / "file" / "x.png")
    assert len(read_coco(out / "all.json")["images"]) == 2


def test_glas_with_something_missing_or_strange(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root, out = write_glands(tmp_path / "in", 2, 1, 64, 64), tmp_path / "out"
    (root / "Grade.csv").unlink()
    assert main(["detect", "prepare", "glas", str(root), str(tmp_path / "ungraded")]) == 0
    assert "no Grade.csv here" in caplog.text
    (root / "testA_1.bmp").rename(root / "other.bmp")
    refused(capfd, "other.bmp: not a name of GlaS", "glas", root, out)
    (root / "other.bmp").unlink()
    refused(capfd, "testA_1_anno.bmp: a mask without its image", "glas", root, out)
    (root / "testA_1_anno.bmp").unlink()
    (root / "train_2_anno.bmp").unlink()
    refused(capfd, "train_2.bmp: has no mask; restore train_2_anno.bmp", "glas", root, out)
    assert not out.exists()


def test_patients_in_two_splits_are_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    root = write_glands(tmp_path / "in", 2, 1, 64, 64)
    (root / "Grade.csv").write_text("name,patient ID\ntrain_1,4\ntrain_2,5\ntestA_1,4\n")
    assert "train and testA share 1 patients" in prepared(capfd, "glas", root, tmp_path / "out")


def test_masks_of_files_from_elsewhere() -> None:
    """Polygons and uncompressed run lengths, which other tools write."""
    square = np.zeros((6, 8), bool)
    square[1:4, 2:6] = True
    assert np.array_equal(decode_mask([[2, 1, 6, 1, 6, 4, 2, 4]], 6, 8), square)
    counts = [13, 3, 3, 3, 3, 3, 3, 3, 14]  # down the columns
    assert np.array_equal(decode_mask({"size": [6, 8], "counts": counts}, 6, 8), square)
    for damaged in ({"size": [6, 8]}, "text", {"size": [5, 8], "counts": encode_mask(square[1:])["counts"]}):
        with pytest.raises(InputError, match="segmentation: "):
            decode_mask(damaged, 6, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no list of images"),
        (json.dumps({"images": [], "annotations": [], "categories": [{"id": 1}]}), "categories lacks name"),
        (
            json.dumps(
                {"images": [], "categories": [], "annotations": [
                    {"id": 5, "image_id": 2, "category_id": 1, "segmentation": [], "area": 1, "bbox": [0, 0, 1, 1]}
                ]}
            ),
            "annotation 5 is of image 2",
        ),
    ],
)  # fmt: skip
def test_damaged_coco_files(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_coco(tmp_path / "x.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_coco(tmp_path / "none.json")


@pytest.mark.skipif(not GLAS.is_dir(), reason="needs the real GlaS images in ../shared/data/glas")
def test_real_glas_comes_back_exactly(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [f"{split}_{number}" for split in ("train", "testA") for number in (1, 12, 51)]
    for name in names:
        for file in (f"{name}.png", f"{name}_anno.png"):
            shutil.copy(GLAS / file, tmp_path / "in")
    shutil.copy(GLAS / "index.csv", tmp_path / "in")
    assert main(["detect", "prepare", "glas", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    for split in ("train", "testA"):
        data = read_coco(tmp_path / "out" / f"{split}.json")
        for image in data["images"]:
            source = mask_of(GLAS / image["file_name"].replace(".png", "_anno.png"))
            assert np.array_equal(instance_ids(image, data["annotations"]), source)
            assert image["grade"] in ("benign", "malignant") and image["patient_id"].isdecimal()


def test_without_pycocotools_one_line_says_what_to_install(
    pairs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "pycocotools.mask", raising=False)
    refused(capfd, 'pip install "ca2cl[detection]"', "masks", pairs, tmp_path / "out")
    assert not (tmp_path / "out").exists()
