"""``ca2cl shard`` of slides: pixels, facts, classes, failures, and the same folder after any interruption."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run
from ca2cl.errors import InputError
from ca2cl.slides import stage
from ca2cl.slides.cut import cut_piece
from ca2cl.slides.readers.open import open_slide
from tests.support.slides import tissue_picture, write_svs
from tests.support.stores import BUCKET, http_store, in_turn, s3_store
from tests.support.vendors import write_leica

SIDE = 64
CHILD = """
import sys
from ca2cl.data.shards.run import ShardConfig, run
if __name__ == "__main__":
    sys.exit(run(ShardConfig(source=sys.argv[1], out=sys.argv[2], mpp=0.5, tile=64, workers=2, samples_per_shard=50)))
"""


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three slides of .5 micrometres a pixel, the last one without a word about it."""
    folder = tmp_path_factory.mktemp("slides")
    for number, mpp in enumerate((0.5, 0.5, None)):
        write_svs(folder / f"s{number}.svs", tissue_picture(700, 500, number), mpp, levels=(2,))
    return folder


def shard(source: Path, out: Path, **options: Any) -> ShardIndex:
    """The shards of a job that must succeed."""
    options = {"mpp": 0.5, "tile": SIDE, "workers": 1} | options
    assert run(ShardConfig(source=str(source), out=str(out), **options)) == 0
    return ShardIndex(out)


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["slide"]: row for row in map(json.loads, (out / "slides.jsonl").read_text().splitlines())}


def tiles(out: Path) -> dict[str, tuple[dict[str, Any], bytes]]:
    """Facts and encoded image of every tile, by key."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                found.setdefault(key, {})[ext] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return {
        key: (json.loads(parts["json"]), next(data for ext, data in parts.items() if ext not in ("json", "cls")))
        for key, parts in found.items()
    }


def test_tiles_are_the_slides_pixels_with_their_place(slides: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shard(slides, out, encode="png", tissue=0.0, assume_mpp=("s2*=0.5",))
    found = tiles(out)
    assert len(found) == 3 * (700 // SIDE) * (500 // SIDE)
    for facts, data in found.values():
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        slide = open_slide(slides / f"{facts['slide']}.svs")
        assert (slide.read(0, facts["x"], facts["y"], SIDE, SIDE) == pixels).all()
        assert (facts["mpp"], facts["slide_mpp"], facts["level"]) == (0.5, 0.5, 0)
        assert facts["group"] == facts["slide"]
    row = rows(out)["s2"]
    assert (row["mpp"], row["mpp_from"], row["kept"]) == (0.5, "assumed", len(found) // 3)
    assert rows(out)["s0"]["mpp_from"] == "slide"


def test_jpeg_is_the_default_and_near(slides: Path, tmp_path: Path) -> None:
    shard(slides / "s0.svs", tmp_path / "out", tissue=0.0)
    for facts, data in tiles(tmp_path / "out").values():
        slide = open_slide(slides / "s0.svs")
        error = np.asarray(Image.open(io.BytesIO(data))).astype(float) - slide.read(
            0, facts["x"], facts["y"], SIDE, SIDE
        )
        assert data[:2] == b"\xff\xd8"
        assert np.sqrt((error**2).mean()) < 6


def test_tissue_is_kept_and_glass_is_not(slides: Path, tmp_path: Path) -> None:
    shard(slides / "s0.svs", tmp_path / "out", preview=str(tmp_path / "new" / "preview.png"))
    assert Image.open(tmp_path / "new" / "preview.png").width > 300
    row = rows(tmp_path / "out")["s0"]
    assert row["kept"] + sum(row["dropped"].values()) == row["grid"] == 70
    for facts, _ in tiles(tmp_path / "out").values():  # the tissue is an ellipse of .6
        assert (facts["x"] / 700) ** 2 + (facts["y"] / 500) ** 2 < 0.6
    assert 25 <= row["kept"] <= 45
    with Image.open(tmp_path / "out" / "thumbnails" / "000000.jpg") as thumbnail:
        assert thumbnail.size == (512, 366)  # the mask has 175 x 125


def test_a_bad_slide_is_a_row_and_the_others_go_on(
    slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("s0.svs", "s2.svs"):
        (folder / name).symlink_to(slides / name)
    (folder / "broken.svs").write_bytes(b"none")
    (folder / "twin.svs").symlink_to(slides / "s0.svs")
    write_svs(folder / "white.svs", np.full((300, 300, 3), 245, np.uint8), 0.5)
    write_svs(folder / "small.svs", tissue_picture(50, 50), 0.5)
    write_svs(folder / "coarse.svs", tissue_picture(300, 300), 8.0)
    damaged = write_svs(folder / "damaged.svs", tissue_picture(700, 500, 9), 0.5)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    damaged.write_bytes(data)
    out = tmp_path / "out"
    shard(folder, out)
    found = rows(out)
    errors = {name: row["error"] for name, row in found.items()}
    assert errors["s0"] is None
    assert "states no micrometres a pixel (objective 20x); give them in the CSV's column mpp" in errors["s2"]
    assert "OpenSlide cannot open it" in errors["broken"]
    assert errors["twin"] == "the same slide as s0"
    assert errors["white"] is None
    assert (found["white"]["kept"], found["white"]["dropped"]) == (0, {"background": 16})
    assert "less than a tile of 64" in errors["small"]
    assert "its 8 micrometres a pixel are coarser than --mpp 0.5" in errors["coarse"]
    assert "does not decode" in errors["damaged"]
    assert {facts["slide"] for facts, _ in tiles(out).values()} == {"s0"}
    assert "white first" in caplog.text
    with pytest.raises(InputError, match=r"7 of 8 slides failed|6 of 8 slides failed"):
        run(ShardConfig(source=str(folder), out=str(tmp_path / "strict"), mpp=0.5, tile=SIDE, workers=1, strict=True))
    assert not (tmp_path / "strict" / "manifest.json").exists()


def test_a_table_gives_patients_labels_and_splits(slides: Path, tmp_path: Path) -> None:
    table = tmp_path / "cohort.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "patient", "label", "mpp", "split", "age"])
        writer.writerow([slides / "s0.svs", "p1", "tumour", "", "train", 1])
        writer.writerow([slides / "s1.svs", "p1", "normal", "", "test", 2])
        writer.writerow([slides / "s2.svs", "p2", "normal", 0.5, "train", 3])
    index = shard(table, tmp_path / "out", split="train")
    assert index.manifest.classes == ["normal", "tumour"]
    for facts, _ in tiles(tmp_path / "out").values():
        assert (facts["patient"], facts["class"]) == (
            ("p1", "tumour") if facts["slide"].endswith("s0") else ("p2", "normal")
        )
        assert facts["group"] == facts["patient"]
    with pytest.raises(InputError, match=r"has the splits 'test', 'train'; choose one by --split"):
        shard(table, tmp_path / "none")


def test_the_canvas_around_what_was_scanned_gives_no_tile(tmp_path: Path) -> None:
    path = write_leica(tmp_path / "a.scn", tissue_picture(700, 500), 0.5, (2000, 1400), (640, 320))
    shard(path, tmp_path / "out", tissue=0.0)
    row = rows(tmp_path / "out")["a"]
    assert row["grid"] == 31 * 21
    assert row["kept"] == 11 * 8  # those that the scanned region has a part in
    assert row["dropped"] == {"unscanned": 31 * 21 - 11 * 8}


def test_copies_are_not_cut(slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in "abc":
        (folder / f"{name}.svs").hardlink_to(slides / "s0.svs")
    cut: list[int] = []
    monkeypatch.setattr(stage, "cut_piece", lambda *task: cut.append(task[1]) or cut_piece(*task))
    shard(folder, tmp_path / "out")
    assert cut == [0]
    assert [row["error"] for row in rows(tmp_path / "out").values()] == [None, *["the same slide as a"] * 2]


def test_a_job_without_tiles_leaves_its_folder_to_another_one(slides: Path, tmp_path: Path) -> None:
    preview = tmp_path / "preview.html"
    with pytest.raises(InputError, match=r"no slide gave a tile, .*: states no micrometres a pixel"):
        shard(slides / "s2.svs", tmp_path / "out", preview=str(preview))
    assert "states no micrometres" in preview.read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".plan", "slides.jsonl"]
    assert shard(slides / "s2.svs", tmp_path / "out", assume_mpp=("*=0.5",)).manifest.samples > 0
    write_svs(tmp_path / "white.svs", np.full((300, 300, 3), 245, np.uint8), 0.5)
    with pytest.raises(InputError, match=r"the first: white: all tiles dropped \(background 16\)"):
        shard(tmp_path / "white.svs", tmp_path / "white")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide;patient\na.svs;p", r"has semicolons between its columns \(slide;patient\); save it with commas"),
        ("path\na.svs", "has no column slide but path; its columns are slide, patient"),
        ("slide,label\na.svs,x\n./a.svs,y", "a.svs: the slide is listed twice"),
        ("slide,label\na.svs,x\nb.svs,", "1 slides have no label"),
        ("slide,mpp\na.svs,40x", "line 2 has mpp '40x'"),
        ("slide,patient\n,p", "line 2 names no slide"),
        ("slide\n", "a.csv: lists no slide"),
    ],
)
def test_bad_tables_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "a.csv"
    table.write_text("\ufeff" + text, encoding="utf-8")  # Excel's mark does not matter
    with pytest.raises(InputError, match=message):
        shard(table, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_annotations_choose_tiles_and_classes(slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def region(x0: int, x1: int, name: str) -> dict[str, Any]:
        ring = [[x0, 0], [x1, 0], [x1, 256], [x0, 256], [x0, 0]]
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }

    masks = tmp_path / "masks"
    masks.mkdir()
    features = [region(0, 128, "Tumor"), region(128, 256, "Stroma")]
    (masks / "s0.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    index = shard(slides, tmp_path / "out", mask=str(masks), tissue=0.0)
    assert index.manifest.counts == {"Stroma": 8, "Tumor": 8}
    for facts, _ in tiles(tmp_path / "out").values():
        assert facts["class"] == ("Tumor" if facts["x"] < 128 else "Stroma")
    assert rows(tmp_path / "out")["s1"]["dropped"] == {"outside": 70}
    (masks / "s1.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [region(0, 9000, "x")]}))
    with pytest.raises(InputError, match=r"s1: the slide was changed after"):  # or its annotation
        shard(slides, tmp_path / "out", mask=str(masks), tissue=0.0)
    with pytest.raises(InputError, match=r"holds another job \(tissue 0.0 -> 0.5\)"):
        shard(slides, tmp_path / "out", mask=str(masks))
    del features[1]["properties"]["classification"]
    (masks / "s0.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    shard(slides, tmp_path / "other", mask=str(masks), tissue=0.0)
    assert "8 of 16 tiles have no class, because their annotations have none" in caplog.text
    assert "s1.geojson" in rows(tmp_path / "other")["s1"]["error"]


def test_a_draw_of_tiles_is_the_seeds(slides: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        shard(slides / "s0.svs", tmp_path / name, max_tiles=9, seed=seed)
    first, again, other = (set(tiles(tmp_path / name)) for name in "abc")
    assert len(first) == 9
    assert first == again != other
    assert rows(tmp_path / "a")["s0"]["dropped"]["surplus"] > 0


def test_any_number_of_processes_and_any_kill_give_one_digest(slides: Path, tmp_path: Path) -> None:
    expected = shard(slides, tmp_path / "one", samples_per_shard=50).manifest.digest
    out = tmp_path / "killed"
    command = [sys.executable, "-c", CHILD, str(slides), str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    for pattern, count in ((".plan/slides/*/scan.json", 1), (".plan/slides/*/*.bin", 2), ("*.tar", 1)):
        child = subprocess.Popen(command, env=environment)
        while child.poll() is None and len(list(out.glob(pattern))) < count:
            time.sleep(0.001)
        assert child.returncode is None, "the job was done before it could be killed"
        child.kill()  # its workers end by themselves, and Python's tracker of semaphores removes theirs
        child.wait()
        assert not (out / "manifest.json").exists()
    subprocess.run(command, env=environment, check=True)
    assert ShardIndex(out).manifest.digest == expected
    left = [path for path in (out / ".plan" / "slides").iterdir() if path.name != "cut.json"]
    assert not left
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock"}
    started = time.time()
    shard(slides, out, samples_per_shard=50)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert time.time() - started < 60


def test_remote_slides_are_copied_one_at_a_time_and_removed(slides: Path, tmp_path: Path) -> None:
    """From S3, and from an HTTP server that breaks off, hangs up, and has lost a file."""
    import boto3

    faults = {"s0.svs": ["cut", "500"], "s9.svs": ["404"] * 99}
    with s3_store(), http_store(slides, fault=in_turn(faults)) as (url, handler):
        boto3.client("s3").upload_file(str(slides / "s1.svs"), BUCKET, "a/s1.svs")
        table = tmp_path / "cohort.csv"
        table.write_text(
            f"slide,patient\n{url}/s0.svs?signature=secret,p0\ns3://{BUCKET}/a/s1.svs,p1\n{url}/s9.svs,p9\n"
        )
        shard(table, tmp_path / "out", samples_per_shard=50)
        asked = len(handler.requests)
        shard(table, tmp_path / "out", samples_per_shard=50)
    assert len(handler.requests) == asked
    found = rows(tmp_path / "out")
    assert (found["s0"]["path"], found["a/s1"]["error"]) == (f"{url}/s0.svs", None)
    assert found["s9"]["error"].startswith("not found; check the address")
    assert not list((tmp_path / "out").rglob("*.svs"))
    local = shard(slides, tmp_path / "local")
    assert local.manifest.samples == sum(row["kept"] for row in found.values())
    remote = sorted(data for _, data in tiles(tmp_path / "out").values())
    assert remote == sorted(data for _, data in tiles(tmp_path / "local").values())
    written = "".join(path.read_text(errors="replace") for path in (tmp_path / "out").rglob("*.json*"))
    assert "secret" not in written


def test_a_lost_shard_is_made_again(slides: Path, tmp_path: Path) -> None:
    first = shard(slides, tmp_path / "out", samples_per_shard=50).manifest.digest
    next((tmp_path / "out").glob("*.tar")).write_bytes(b"cut")
    assert shard(slides, tmp_path / "out", samples_per_shard=50).manifest.digest == first


def test_a_changed_slide_is_not_mixed_with_tiles_cut_before(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", tissue_picture(300, 300), 0.5)
    shard(path, tmp_path / "out", tissue=0.0)
    write_svs(path, tissue_picture(300, 300, 1), 0.5)
    with pytest.raises(InputError, match=r"a: the slide was changed after its tiles were cut"):
        shard(path, tmp_path / "out", tissue=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 8}, "tile is 8: use 16 or more"),
        ({"overlap": 64}, "overlap is 64: use less than --tile 64"),
        ({"assume_mpp": ("0.5",)}, "assume_mpp is '0.5': use PATTERN=VALUE"),
        ({"mpp": None, "tissue": 0.7}, "is set without mpp"),
        ({"resize": 32, "encode": "png"}, "tiles of slides have the side --tile"),
        ({"preview": "a.pdf"}, "preview is 'a.pdf': give a file NAME.html or NAME.png"),
        ({"mask": "nowhere"}, "mask is 'nowhere': not there"),
        ({"source": "nowhere"}, "no slides here"),
        ({"source": "cohort.csv", "split": "train"}, "cohort.csv: no such file; give a CSV with the columns slide, "),
        ({"mask": __file__}, "one file for 3 slides; give a folder"),
        ({"preview": f"{__file__}/a.png"}, "a.png': cannot be written; give a file in a folder"),
    ],
)
def test_bad_settings_are_one_line(slides: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    settings = {"source": str(slides), "out": str(tmp_path / "out"), "mpp": 0.5, "tile": SIDE, "workers": 1} | options
    with pytest.raises(InputError, match=message) as caught:
        run(ShardConfig(**settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
