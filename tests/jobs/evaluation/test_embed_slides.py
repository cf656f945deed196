"""``ca2cl embed`` straight from slides: the vectors of their shards, places, failures, kills, processes, URLs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.ndimage import gaussian_filter

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as shard
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.config import EmbedConfig
from ca2cl.evaluation.embed.run import run
from tests.support.embedding import config, files, interrupt, write_encoder
from tests.support.forked import ca2cl
from tests.support.slides import tissue_picture, write_svs
from tests.support.stores import http_store, in_turn

SIDE, PART = 64, 10


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and slides of .5 and .25 micrometres a pixel, one of them with a blurred half."""
    folder = tmp_path_factory.mktemp("slides")
    write_encoder(folder / "encoder")
    (folder / "in").mkdir()
    picture = tissue_picture(500, 300, 0)
    picture[:, 250:] = gaussian_filter(picture[:, 250:], (5, 5, 0))
    write_svs(folder / "in" / "a.svs", picture, 0.5)
    write_svs(folder / "in" / "b.svs", tissue_picture(600, 500, 1), 0.26)
    return folder


def settings(root: Path, out: Path, **changes: Any) -> EmbedConfig:
    given = {"source": str(root / "in"), "mpp": 0.5, "tile": SIDE, "tissue": 0.0, "sharpness": 0.13}
    given |= {"part_size": PART, "batch_size": PART}
    return config(root, out, **{**given, **changes})


@pytest.fixture(scope="module")
def embedded(root: Path) -> Path:
    """The Parquet file of both slides, made in one process and one go."""
    assert run(settings(root, root / "whole.parquet")) == 0
    return root / "whole.parquet"


def rows(out: Path) -> list[dict[str, Any]]:
    """Lines of the slides' file, without times."""
    lines = out.with_name(f"{out.stem}.slides.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def by_key(out: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(out).to_pylist()}


def facts_of(shards: Path) -> dict[str, dict[str, Any]]:
    """The ``.json`` of every tile of some shards, by key."""
    found = {}
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    found[member.name.partition(".")[0]] = json.load(tar.extractfile(member))  # type: ignore[arg-type]
    return found


def test_vectors_and_places_are_those_of_lossless_shards(root: Path, embedded: Path, tmp_path: Path) -> None:
    options = {"mpp": 0.5, "tile": SIDE, "tissue": 0.0, "sharpness": 0.13, "encode": "png", "workers": 1}
    assert shard(ShardConfig(source=str(root / "in"), out=str(tmp_path / "shards"), **options)) == 0
    assert run(config(root, tmp_path / "shards.parquet", source=str(tmp_path / "shards"))) == 0
    wanted, found, facts = by_key(tmp_path / "shards.parquet"), by_key(embedded), facts_of(tmp_path / "shards")
    assert wanted.keys() == found.keys() and len(found) > 20
    for key, row in found.items():
        np.testing.assert_allclose(row["vector"], wanted[key]["vector"], rtol=1e-4, atol=1e-5)
        assert (row["slide"], row["x"], row["y"]) == tuple(facts[key][name] for name in ("slide", "x", "y"))
        slide_mpp = {"a": 0.5, "b": 0.26}[row["slide"]]
        assert row["mpp"] == 0.5 and row["side"] == pytest.approx(SIDE * 0.5 / slide_mpp, rel=1e-9)
        assert row["source"] == f"{row['slide']}.svs" and row["patient"] is row["label"] is None
    shards = [json.loads(line) for line in (tmp_path / "shards" / "slides.jsonl").read_text().splitlines()]
    assert [{name: row[name] for name in row if name != "seconds"} for row in shards] == rows(embedded)
    assert rows(embedded)[0]["dropped"]["blurred"] > 5
    assert not (root / "whole.parquet.parts").exists()


def test_slides_come_one_after_another_and_no_part_has_two(embedded: Path) -> None:
    file = pq.ParquetFile(embedded)
    groups = [set(file.read_row_group(group)["slide"].to_pylist()) for group in range(file.num_row_groups)]
    assert len(groups) > 4 and all(len(group) == 1 for group in groups)
    names = [name for group in groups for name in group]
    assert names == sorted(names)


def test_two_processes_go_on_from_one_and_write_the_same_file(
    root: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.parquet"
    parts = interrupt(monkeypatch, settings(root, out), after=2)
    assert [path for path in files(parts) if path.startswith("part-")] == ["part-000000.parquet", "part-000001.parquet"]
    words = ["--mpp", "0.5", "--tile", str(SIDE), "--tissue", "0", "--sharpness", "0.13", "--part_size", str(PART)]
    words += ["--batch_size", str(PART), "--workers", "0", "--encoder", str(root / "encoder"), "--device", "cpu"]
    finished = ca2cl(tmp_path, "embed", *words, str(root / "in"), str(out), processes=2)
    assert finished.returncode == 0, finished.stderr
    assert "2 of 5 parts are finished" in finished.stderr
    assert out.read_bytes() == embedded.read_bytes() and rows(out) == rows(embedded)
    assert files(tmp_path) == ["two.parquet", "two.slides.jsonl"]


def test_a_bad_slide_is_a_row_and_the_others_go_on(root: Path, tmp_path: Path) -> None:
    """One that does not open, one that breaks off in its middle, after tiles of it were embedded, and a copy."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b", "twin"):
        (tmp_path / "in" / f"{name}.svs").symlink_to(root / "in" / f"{name[:1].replace('t', 'a')}.svs")
    (tmp_path / "in" / "a0.svs").write_bytes(b"none")
    damaged = write_svs(tmp_path / "in" / "aa.svs", tissue_picture(700, 500, 9), 0.5)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4000] = bytes(4000)
    damaged.write_bytes(data)
    changes = {"source": str(tmp_path / "in"), "tokens": ("patch",)}
    out = tmp_path / "bad.safetensors"
    assert run(settings(root, out, **changes)) == 0
    errors = {row["slide"]: row["error"] for row in rows(out)}
    assert errors["a"] is errors["b"] is None and errors["twin"] == "the same slide as a"
    assert "OpenSlide cannot open it" in errors["a0"] and errors["aa"].startswith("level 0 does not decode")
    assert run(settings(root, tmp_path / "good.safetensors", tokens=("patch",))) == 0
    bad, good = load_file(out), load_file(tmp_path / "good.safetensors")
    assert good["tokens"].shape[1:] == (1, 1, 512)
    for name in ("vectors", "tokens"):
        np.testing.assert_array_equal(bad[name], good[name])
    places = [json.loads(line) for line in (tmp_path / "bad.keys.jsonl").read_text().splitlines()]
    assert {place["slide"] for place in places} == {"a", "b"} and len(places) == len(bad["vectors"])
    with pytest.raises(InputError, match=r"3 of 5 slides failed|2 of 5 slides failed"):
        run(settings(root, tmp_path / "strict.parquet", **{**changes, "tokens": ()}, strict=True))
    assert not (tmp_path / "strict.parquet").exists()


def test_a_slide_that_can_be_read_later_moves_no_tile_of_another(
    root: Path, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of the slides behind it have the same numbers then, and are not taken for those."""
    from ca2cl.slides.readers import open as opening
    from ca2cl.slides.readers import openslide

    out, opened = tmp_path / "v.parquet", openslide.OpenSlideReader.__init__

    def fail(self: Any, path: Path) -> None:
        if path.name == "a.svs":
            raise openslide.SlideError(f"{path}: away")
        opened(self, path)

    with monkeypatch.context() as patched:
        patched.setattr(openslide.OpenSlideReader, "__init__", fail)
        interrupt(monkeypatch, settings(root, out), after=1)
    opening._opened.cache_clear()  # the next job is another process
    assert run(settings(root, out)) == 0
    assert out.read_bytes() == embedded.read_bytes()


def test_a_table_gives_patients_and_labels_and_a_preview_what_is_blurred(root: Path, tmp_path: Path) -> None:
    """In the colour of ``shard --preview``. One of the 14 tiles that are drawn is blurred, or more."""
    preview = tmp_path / "preview.png"
    table = root / "cohort.csv"
    table.write_text("slide,patient,label\nin/a.svs,p1,tumour\nin/b.svs,p2,normal\n")
    assert run(settings(root, tmp_path / "v.parquet", source=str(table), max_tiles=14, preview=str(preview))) == 0
    found = pq.read_table(tmp_path / "v.parquet")
    assert set(zip(*(found[name].to_pylist() for name in ("patient", "label")), strict=True)) == {
        ("p1", "tumour"), ("p2", "normal"),
    }  # fmt: skip
    blurred = rows(tmp_path / "v.parquet")[0]["dropped"]["blurred"]
    assert found.num_rows == 28 - blurred and blurred >= 1
    picture = np.asarray(Image.open(preview), int)
    assert (np.abs(picture - (86, 180, 233)).sum(axis=2) < 6).sum() > 100 * blurred


def test_remote_slides_are_removed_and_a_lost_one_is_a_row(root: Path, embedded: Path, tmp_path: Path) -> None:
    faults = {"c.svs": ["404"] * 9}
    with http_store(root / "in", fault=in_turn(faults)) as (url, _):
        table = tmp_path / "cohort.csv"
        table.write_text(f"slide\n{url}/a.svs?signature=secret\n{url}/b.svs\n{url}/c.svs\n")
        assert run(settings(root, tmp_path / "v.parquet", source=str(table))) == 0
    found, wanted = pq.read_table(tmp_path / "v.parquet"), pq.read_table(embedded)
    assert found.drop_columns("source").equals(wanted.drop_columns("source"))
    assert [row["error"] is None for row in rows(tmp_path / "v.parquet")] == [True, True, False]
    assert files(tmp_path) == ["cohort.csv", "v.parquet", "v.slides.jsonl"]
    assert b"secret" not in (tmp_path / "v.parquet").read_bytes()


def test_a_finished_job_reads_no_slide(
    root: Path, embedded: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ca2cl.slides import stage

    monkeypatch.delattr(stage, "scan_slide")
    assert run(settings(root, embedded)) == 0
    assert "already complete" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: {"mpp": None}, "is set without mpp"),
        (lambda root: {"overlap": 64}, "overlap is 64: use less than --tile 64"),
        (lambda root: {"source": str(root / "encoder")}, "no slides here"),
        (lambda root: {"mpp": 0.1}, "no slide gave a tile, see .*slides.jsonl; the first: .*coarser than --mpp 0.1"),
        (
            lambda root: {"source": str(root / "white.svs"), "tissue": 0.5},
            r"the first: white: all tiles dropped \(background 16\)",
        ),
        (lambda root: {"source": str(root / "silent.svs")}, "states no micrometres a pixel"),
    ],
)
def test_bad_input_is_one_line(
    root: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    if not (root / "white.svs").exists():
        write_svs(root / "white.svs", np.full((300, 300, 3), 245, np.uint8), 0.5)
        write_svs(root / "silent.svs", tissue_picture(300, 300), None)
    with pytest.raises(InputError, match=message) as caught:
        run(settings(root, tmp_path / "out" / "v.parquet", **change(root)))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.parts"))
