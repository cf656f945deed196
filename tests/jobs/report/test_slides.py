"""``ca2cl report`` of tiles that were cut from slides: the squares, captions and shares of the page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as run_shard
from tests.jobs.report.test_report import Job, report
from tests.support.pages import Page
from tests.support.runs import write_run
from tests.support.slides import write_svs


def test_slides_are_drawn_with_their_clusters(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The left half of each slide is one tissue, and one cluster."""
    (tmp_path / "slides").mkdir()
    for number, size in enumerate(((384, 256), (256, 128))):
        write_svs(tmp_path / "slides" / f"s{number}.svs", two_tissues(*size, seed=number), 0.5)
    shards = tmp_path / "shards"
    run_shard(ShardConfig(source=str(tmp_path / "slides"), out=str(shards), mpp=0.5, tile=32, workers=1, sharpness=0))
    assert ShardIndex(shards).manifest.samples == 12 * 8 + 8 * 4
    root = str(tmp_path_factory.getbasetemp() / "tracking-tests")
    tracker = write_run(tmp_path / "run", root, shards)
    tracker.finish("FINISHED")
    job = Job(tmp_path / "run", str(tmp_path / "run"), shards, shards, root)
    made = report(job, tmp_path / "a.html", "--clusters", "2")
    drawn = squares(made)
    assert [len(one) for one in drawn] == [12 * 8, 8 * 4]
    (left,), (right,) = ({group for one in drawn for group, x, _ in one if (x < 280) == side} for side in (True, False))
    assert {left, right} == {"g0", "g1"}
    for one, (columns, rows) in zip(drawn, ((12, 8), (8, 4)), strict=True):
        side = 560 / columns
        wanted = {(round(side * column, 1), round(side * row, 1)) for row in range(rows) for column in range(columns)}
        assert {(x, y) for _, x, y in one} == wanted
    assert "s0 96 of 96 tiles, 0.19 x 0.13 mm" in made.text and "s1 32 of 32 tiles" in made.text
    assert len(made.all("image")) == 2
    alts = [held["alt"] for held in made.all("img") if " at " in held["alt"]]
    assert len(alts) == 12 * 9
    by_chance = (96 * 95 + 32 * 31) / (128 * 127)
    assert f"are of the tile's own slide; by chance it would be {100 * by_chance:.1f} %" in made.text
    for start in range(0, len(alts), 9):
        query, *others = (alt.split("slide ")[-1].split(", ")[-1] for alt in alts[start : start + 9])
        for alt, key in zip(alts[start + 1 : start + 9], others, strict=True):
            slide, x, y = re.fullmatch(r"(s\d)_x(\d+)_y(\d+)", key).groups()  # type: ignore[union-attr]
            own = "own slide" if slide == query[:2] else "slide"
            assert f", {own} {slide} at {int(x) / 2000:.2f} and {int(y) / 2000:.2f} mm, " in alt
    assert sum("own slide" in alt for alt in alts) == len(made.all("figure", "own"))
    shutil.rmtree(shards / "thumbnails")
    (shards / "slides.jsonl").unlink()
    again = report(job, tmp_path / "b.html", "--clusters", "2", "--tiles", "12")
    bare = squares(again)
    assert sum(len(one) for one in bare) == 12 and not again.all("image")
    assert f"s0 {len(bare[0])} tiles" in again.text and "no thumbnail" in again.text


def squares(made: Page) -> list[list[tuple[str, float, float]]]:
    """Cluster and corner of every square, map by map."""
    found: list[list[tuple[str, float, float]]] = []
    group = ""
    for tag, held in made.elements:
        if tag == "figure" and held.get("class") == "slide-map":
            found.append([])
        elif tag == "g":
            group = held["class"].split()[1]
        elif tag == "rect" and group:
            found[-1].append((group, float(held["x"]), float(held["y"])))
            group = ""
    return found


def two_tissues(width: int, height: int, seed: int) -> np.ndarray:
    """Pale pink on the left, dark purple on the right."""
    noise = np.random.default_rng(seed).normal(0, 12, (height, width, 1))
    left = (np.arange(width) < width / 2)[None, :, None]
    return np.clip(np.where(left, (230, 150, 195), (110, 60, 140)) + noise, 0, 255).astype(np.uint8)
