"""``ca2cl shard``: bytes kept, any reader reads them, any worker count and any kill give the same folder."""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run
from ca2cl.errors import InputError

CLASSES = ("ADI", "LYM", "TUM")
CHILD = """
import sys
from ca2cl.data.shards.run import ShardConfig, run
from ca2cl.errors import InputError
if __name__ == "__main__":
    try:
        sys.exit(run(ShardConfig(source=sys.argv[1], out=sys.argv[2], samples_per_shard=4, workers=int(sys.argv[3]))))
    except InputError as error:
        sys.stderr.write(f"{error}\\n")
        sys.exit(2)
"""


def tile(seed: int, kind: str, side: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Thirty tiles of three classes, nested as the published archive of NCT-CRC-HE unzips."""
    root = tmp_path / "unzipped" / "NCT-CRC-HE"
    for seed in range(30):
        kind, ext = (("TIFF", "tif"), ("PNG", "png"), ("JPEG", "JPG"))[seed % 3]
        path = root / CLASSES[seed // 10] / f"{CLASSES[seed // 10]}-TCGA-{seed:04d}.v1.{ext}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tile(seed, kind))
    (root / ".DS_Store").write_bytes(b"")
    return tmp_path / "unzipped"


def shard(source: Path, out: Path, **options: Any) -> ShardIndex:
    options = {"samples_per_shard": 4, "workers": 1} | options
    assert run(ShardConfig(source=str(source), out=str(out), **options)) == 0
    return ShardIndex(out)


def contents(out: Path) -> dict[str, bytes]:
    """Every file that a reader of the folder sees."""
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()}


def sources(tree: Path) -> dict[str, bytes]:
    root = tree / "NCT-CRC-HE"
    return {str(path.relative_to(root)): path.read_bytes() for path in root.glob("*/*.*")}


def test_bytes_labels_and_names_come_through(tree: Path, tmp_path: Path) -> None:
    index = shard(tree, tmp_path / "out", group_pattern=r"TCGA-(\d\d)")
    expected = sources(tree)
    found = {}
    for number, samples in enumerate(index):
        path = tmp_path / "out" / index.shards[number].name
        with tarfile.open(path) as tar:
            offsets = {member.name: member.offset_data for member in tar}
            assert all((m.mtime, m.uid, m.gid, m.uname) == (0, 0, 0, "") for m in tar)
            for row in range(len(samples)):
                key, offset, size = samples.key[row], int(samples.offset[row]), int(samples.size[row])
                about = json.load(tar.extractfile(f"{key}.json"))  # type: ignore[arg-type]
                label = int(tar.extractfile(f"{key}.cls").read())  # type: ignore[union-attr]
                assert offsets[f"{key}.{samples.ext[row]}"] == offset
                assert label == samples.label[row] and index.classes[label] == about["class"]
                assert about["name"].startswith(about["class"]) and about["group"] == samples.group[row]
                found[about["name"]] = path.read_bytes()[offset : offset + size]
    assert found == expected
    assert index.manifest.counts == dict.fromkeys(CLASSES, 10)
    assert index.manifest.tile_size == [16, 16] and index.manifest.source == "unzipped"


def test_a_stock_webdataset_reader_yields_every_tile(tree: Path, tmp_path: Path) -> None:
    import webdataset

    shard(tree, tmp_path / "out")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("tif;png;jpg", "cls", "json")
    read = [(about["name"], label, image.shape) for image, label, about in dataset]
    assert sorted(name for name, _, _ in read) == sorted(sources(tree))
    assert all(CLASSES[label] == name.split("/")[0] and shape == (16, 16, 3) for name, label, shape in read)


def test_a_stock_reader_groups_awkward_names(tmp_path: Path) -> None:
    import webdataset

    names = ["__x__/a.b.c.png", "Ünïcode klasse/é.png", "t~u/%7E.png", f"long/{'n' * 200}.png", "v/a.tif", "v/a.png"]
    names += [os.fsdecode(b"raw/\xff.png")]  # a file name that is no text
    for seed, name in enumerate(names):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tile(seed, "PNG"))
    shard(tmp_path / "in", tmp_path / "out", group_pattern=r"[^/]+$")
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(read) == len(names) == len({sample["__key__"] for sample in read})
    for sample in read:
        name = json.loads(sample["json"])["name"]
        assert sample[name.rsplit(".", 1)[1]] == (tmp_path / "in" / name).read_bytes()


def test_shards_mix_classes(tree: Path, tmp_path: Path) -> None:
    index = shard(tree, tmp_path / "out", samples_per_shard=10)
    assert all(len(Counter(samples.label.tolist())) == 3 for samples in index)
    other = shard(tree, tmp_path / "other", samples_per_shard=10, seed=1)
    assert list(other.samples(0).key) != list(index.samples(0).key)


def test_worker_count_changes_no_byte(tree: Path, tmp_path: Path) -> None:
    shard(tree, tmp_path / "one")
    shard(tree, tmp_path / "three", workers=3)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) == 8 + 2


def slow_source(tree: Path, number: int) -> None:
    for seed in range(number):
        path = tree / "NCT-CRC-HE" / CLASSES[seed % 3] / f"more-{seed:05d}.png"
        path.write_bytes(tile(1000 + seed, "PNG"))


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_and_started_again_gives_the_same_folder(tree: Path, tmp_path: Path, workers: int) -> None:
    slow_source(tree, 370)
    shard(tree, tmp_path / "whole")
    out = tmp_path / "out"
    command = [sys.executable, "-c", CHILD, str(tree), str(out), str(workers)]
    with subprocess.Popen(command) as process:
        while len(list(out.glob("*.tar"))) < 20:
            assert process.poll() is None
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
    assert len(children) >= workers - 1
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a writing process outlived its parent"
        time.sleep(0.01)
    assert not (out / "manifest.json").exists()
    (out / ".shard-000000.tar.tmp-1").write_bytes(b"left over")
    sidecars = sorted((out / ".plan").glob("shard-*.json"))
    kept = {path.stem: (out / path.stem).stat().st_mtime_ns for path in sidecars[:-1]}
    first = out / sidecars[-1].stem
    first.write_bytes(first.read_bytes()[:-1] + b"x")  # a tar that rotted is found out and written again
    shard(tree, out, workers=workers)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(kept) >= 10 and all((out / name).stat().st_mtime_ns == mtime for name, mtime in kept.items())
    assert sorted(path.name for path in (out / ".plan").iterdir()) == ["lock", "plan.json"]


def test_a_complete_folder_is_left_alone_and_a_damaged_one_repaired(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shard(tree, out)
    whole = contents(out)
    shard(tree, out, workers=2)
    assert "already complete" in capsys.readouterr().out
    (out / "shard-000003.tar").write_bytes(b"short")
    with pytest.raises(InputError, match=r"shard-000003\.tar: truncated tar"):
        ShardIndex(out)
    shard(tree, out)
    assert contents(out) == whole


@pytest.mark.parametrize("options", [{"samples_per_shard": 5}, {"encode": "png"}, {"seed": 3}])
def test_other_options_into_the_same_folder_are_refused(tree: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    shard(tree, tmp_path / "out")
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    (name,) = options
    with pytest.raises(InputError, match=f"holds another job .{name} .* -> .*: use those settings, or another folder"):
        shard(tree, tmp_path / "out", **options)
    shard(tree, tmp_path / "out", workers=2, check="header")
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before
    assert sorted(files) == sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_another_source_or_foreign_shards_are_refused(tree: Path, tmp_path: Path) -> None:
    shard(tree, tmp_path / "out")
    slow_source(tree, 1)
    with pytest.raises(InputError, match="holds another job .*tiles .* -> "):
        shard(tree, tmp_path / "out")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/a.tar").write_bytes(b"")
    with pytest.raises(InputError, match="is not empty and holds no such job"):
        shard(tree, tmp_path / "foreign")


def test_mixed_sizes_name_two_files_and_the_remedy(tree: Path, tmp_path: Path) -> None:
    (tree / "NCT-CRC-HE/TUM/odd.png").write_bytes(tile(0, "PNG", side=20))
    with pytest.raises(InputError, match=r"(odd\.png).*20 x 20.*TCGA.*16 x 16.*--resize"):
        shard(tree, tmp_path / "out", workers=2)
    index = shard(tree, tmp_path / "png", encode="png", resize=12)
    assert index.manifest.tile_size == [12, 12]


def test_bad_tiles_are_skipped_and_listed_when_asked(tree: Path, tmp_path: Path) -> None:
    (tree / "NCT-CRC-HE/TUM/odd.png").write_bytes(tile(0, "PNG", side=20))
    (tree / "NCT-CRC-HE/ADI/bad.png").write_bytes(b"not an image")
    index = shard(tree, tmp_path / "out", bad="skip")
    listed = (tmp_path / "out/skipped.txt").read_text().splitlines()
    assert len(listed) == 2 and any("odd.png: 20 x 20" in line for line in listed)
    assert index.manifest.samples == len(index) == 30 and index.manifest.counts == dict.fromkeys(CLASSES, 10)
    assert len(shard(tree, tmp_path / "out", bad="skip")) == 30


def test_a_run_that_met_a_bad_tile_goes_on_by_skipping(tree: Path, tmp_path: Path) -> None:
    (tree / "NCT-CRC-HE/ADI/bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"bad\.png.*--bad skip"):
        shard(tree, tmp_path / "out")
    assert len(shard(tree, tmp_path / "out", bad="skip")) == 30
    shard(tree, tmp_path / "at_once", bad="skip")
    assert contents(tmp_path / "out") == contents(tmp_path / "at_once")


@pytest.mark.parametrize("name", ["LYM/LYM-TCGA-0012.v1.tif", "LYM/LYM-TCGA-0013.v1.png", "LYM/LYM-TCGA-0014.v1.JPG"])
def test_a_truncated_tile_is_found_unless_only_headers_are_read(tree: Path, tmp_path: Path, name: str) -> None:
    path = tree / "NCT-CRC-HE" / name
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(InputError, match=f"{name}: does not decode"):
        shard(tree, tmp_path / "out")
    if not name.endswith("tif"):  # here a TIFF's header is at its end
        assert len(shard(tree, tmp_path / "out", check="header")) == 30


def test_skipping_every_tile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in/ADI").mkdir(parents=True)
    (tmp_path / "in/ADI/bad.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match=r"bad\.png"):
        shard(tmp_path / "in", tmp_path / "out", bad="skip")


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("data", [b"", b"not an image", b"II*\0\x08\0\0\0"])
def test_a_file_that_does_not_decode_is_named(tree: Path, tmp_path: Path, data: bytes, workers: int) -> None:
    (tree / "NCT-CRC-HE/LYM/bad.tif").write_bytes(data)
    with pytest.raises(InputError, match=r"LYM/bad\.tif: does not decode") as caught:
        shard(tree, tmp_path / "out", workers=workers)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out/manifest.json").exists() and not list((tmp_path / "out").glob(".*tmp*"))


@pytest.mark.parametrize("side", [9000, 15000])  # above our limit; above the limit of PIL too
def test_a_pixel_bomb_is_refused_from_its_header(tree: Path, tmp_path: Path, side: int) -> None:
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG", compress_level=1)
    (tree / "NCT-CRC-HE/LYM/bomb.png").write_bytes(out.getvalue())
    with pytest.raises(InputError, match=r"bomb\.png: .* pixels.*; cut it into tiles first"):
        shard(tree, tmp_path / "out")


@pytest.mark.parametrize(
    ("encode", "ext", "kind"), [("jpeg", "jpg", "JPEG"), ("webp", "webp", "WEBP"), ("png", "png", "PNG")]
)
def test_encode_changes_every_tile(tree: Path, tmp_path: Path, encode: str, ext: str, kind: str) -> None:
    index = shard(tree, tmp_path / "out", encode=encode)
    assert index.manifest.encode == encode
    samples = index.samples(0)
    data = (tmp_path / "out" / index.shards[0].name).read_bytes()
    for row in range(len(samples)):
        start = int(samples.offset[row])
        image = Image.open(io.BytesIO(data[start : start + int(samples.size[row])]))
        assert samples.ext[row] == ext and image.format == kind and image.size == (16, 16)
        if encode == "png":
            name = samples.key[row].replace("~", "/").replace("%2E", ".")
            (original,) = (tree / "NCT-CRC-HE").glob(f"{name}.*")
            assert np.array_equal(np.asarray(image), np.asarray(Image.open(original).convert("RGB")))


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limit = 9000  # bytes that a file may have: the kernel refuses the rest of a tar as it would on a full disk
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tree), str(out), "1"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2 and "cannot be written" in done.stderr and done.stderr.count("\n") == 1
    assert not list(out.glob("*.tar")) and not list(out.glob(".*.tmp*"))
    assert len(shard(tree, out)) == 30


def test_an_unwritable_folder_is_one_line(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(InputError, match="cannot be written"):
            shard(tree, out)


def test_two_runs_at_once_are_refused(tree: Path, tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "out/.plan").mkdir(parents=True)
    with (tmp_path / "out/.plan/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another job is writing here"):
            shard(tree, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"samples_per_shard": 0}, "samples_per_shard"),
        ({"workers": 0}, "workers"),
        ({"quality": 101}, "quality"),
        ({"resize": 8}, "resize"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_settings_name_their_field(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"^{field} is"):
        ShardConfig(source="a", out="b", **options)


def test_a_saved_dataset_keeps_its_bytes(tmp_path: Path) -> None:
    import datasets

    images = [{"bytes": tile(seed, kind), "path": None} for seed, kind in enumerate(["PNG", "JPEG", "TIFF"] * 4)]
    columns = {"image": images, "label": [seed % 2 for seed in range(12)]}
    dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset.cast_column("label", datasets.ClassLabel(names=["no", "yes"])).save_to_disk(str(tmp_path / "set"))
    index = shard(tmp_path / "set", tmp_path / "out", workers=2)
    found = []
    for number, samples in enumerate(index):
        data = (tmp_path / "out" / index.shards[number].name).read_bytes()
        for row in range(len(samples)):
            start = int(samples.offset[row])
            found.append((samples.key[row], samples.ext[row], data[start : start + int(samples.size[row])]))
    exts = ["png", "jpg", "tif"] * 4
    assert sorted(found) == [(f"train-{row:09d}", exts[row], images[row]["bytes"]) for row in range(12)]
    assert index.manifest.counts == {"no": 6, "yes": 6}


def test_the_summary_says_what_was_written(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = shard(tree, tmp_path / "out")
    said = capsys.readouterr().out
    for part in ("30 of 16 x 16", "ADI=10 LYM=10 TUM=10", "shards   8", "tiles/s", index.manifest.digest):
        assert part in said
