"""``ca2cl heatmap`` of probes, classifiers and clusters: the class of each tile, pictures, GeoJSON, bad input."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ca2cl.config import TrackingConfig
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as shard
from ca2cl.errors import InputError
from ca2cl.evaluation.linear_head import SUFFIX, read_head
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.probe.run import run as probe
from ca2cl.heatmap.config import HeatmapConfig
from ca2cl.heatmap.run import mismatches, run
from ca2cl.heatmap.scorer import find_scorer
from ca2cl.models.encoder_io import read_card, read_weights, save_encoder
from ca2cl.registry.evaluation_run import SOURCE_RUN_TAG
from ca2cl.slides.regions.read import read_regions
from ca2cl.store.open import open_store
from tests.support.embedding import write_encoder
from tests.support.forked import ca2cl
from tests.support.slides import tissue_picture, write_svs

SIDE, MPP = 48, 0.5
CLASSES = ["coarse", "fine"]


def textures(width: int, height: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two kinds of tissue without glass: purple patches, and pink stripes."""
    patches = tissue_picture(4 * width, 4 * height, seed)[:height, :width]
    stripes = np.full_like(patches, (230, 150, 200))
    stripes[:, np.arange(width) // 3 % 2 == 0] = (150, 60, 120)
    return patches, stripes


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide whose left half is one class and right half the other, an encoder, and a probe of these classes."""
    folder = tmp_path_factory.mktemp("heatmap")
    torch.manual_seed(5)
    write_encoder(folder / "encoder")
    for number, side in enumerate(("train", "test")):
        lines = ["slide,label"]
        for label, picture in zip(CLASSES, textures(288, 192, number), strict=True):
            write_svs(folder / f"{side}-{label}.svs", picture, MPP)
            lines.append(f"{side}-{label}.svs,{label}")
        (folder / f"{side}.csv").write_text("\n".join(lines) + "\n")
        options = {"mpp": MPP, "tile": SIDE, "tissue": 0.0, "workers": 1}
        assert shard(ShardConfig(source=str(folder / f"{side}.csv"), out=str(folder / side), **options)) == 0
    patches, stripes = textures(480, 288, 7)
    write_svs(folder / "half.svs", np.concatenate([patches[:, :240], stripes[:, 240:]], axis=1), MPP)
    assert probe(probing(folder)) == 0
    return folder


def probing(root: Path, **changes: Any) -> ProbeConfig:
    settings: dict[str, Any] = {
        "encoder": str(root / "encoder"),
        "train": str(root / "train"),
        "test": str(root / "test"),
        "labels": (4, 1.0),
        "seeds": 1,
        "classifiers": ("logistic", "sgd"),
        "strength": 1.0,
        "sgd_epochs": 5,
        "floors": False,
        "workers": 0,
        "device": "cpu",
        "output": str(root / "probe.json"),
        "tracking": TrackingConfig(root=str(root / "runs")),
    }
    return ProbeConfig(**{**settings, **changes})


def settings(root: Path, out: Path, **changes: Any) -> HeatmapConfig:
    given: dict[str, Any] = {
        "run": str(root / "probe.json"),
        "source": str(root / "half.svs"),
        "out": str(out),
        "mpp": MPP,
        "tile": SIDE,
        "tissue": 0.0,
        "sharpness": 0.0,
        "side": 400,
        "workers": 0,
        "device": "cpu",
        "tracking": TrackingConfig(root=str(root / "runs")),
    }
    return HeatmapConfig(**{**given, **changes})


@pytest.fixture(scope="module")
def maps(root: Path) -> Path:
    """The folder of the probe's maps, made in one process."""
    assert run(settings(root, root / "maps")) == 0
    return root / "maps"


def features(path: Path) -> list[dict[str, Any]]:
    return list(json.loads(path.read_text())["features"])


def boxes_and_names(path: Path) -> dict[tuple[float, float], str]:
    """Class of each tile by its left upper corner; every one a square of the tile's side."""
    found = {}
    for feature in features(path):
        corners = np.array(feature["geometry"]["coordinates"][0])
        (x, y), end = corners.min(axis=0), corners.max(axis=0)
        np.testing.assert_allclose(end - (x, y), SIDE)
        found[float(x), float(y)] = feature["properties"]["classification"]["name"]
    return found


def test_each_tile_has_the_class_that_lies_there(maps: Path) -> None:
    found = boxes_and_names(maps / "half.geojson")
    wanted = {(x * SIDE, y * SIDE): CLASSES[x * SIDE >= 240] for x in range(10) for y in range(6)}
    assert found == wanted
    about = json.loads((maps / "heatmap.json").read_text())
    assert about["slides"][0]["tiles"] == {"coarse": 30, "fine": 30}
    assert about["slides"][0]["shares"] == pytest.approx({"coarse": 0.5, "fine": 0.5})
    picture = np.asarray(Image.open(maps / "half.png").convert("RGB"), int)
    colours = [np.array(about["classes"][name]) for name in CLASSES]
    row = 16 + 26 + 240 + 24 + 120  # the middle of the map, which lies below the slide of 400 x 240 pixels
    left, right = picture[row, 16 + 100], picture[row, 16 + 300]
    for near, colour, other in ((left, *colours), (right, *colours[::-1])):
        assert np.abs(near - colour).sum() < np.abs(near - other).sum()


def test_probabilities_are_the_probes_own(root: Path, maps: Path) -> None:
    """Against the classifier's file by a loop over its rows."""
    head, card = read_head(root / f"probe{SUFFIX}")
    assert card.classes == tuple(CLASSES) and card.classifier == "linear" and card.labels == 1.0
    vectors = pq.read_table(maps / "vectors.parquet")["vector"].to_pylist()
    for vector, feature in zip(vectors[:5], features(maps / "half.geojson"), strict=False):
        moved = np.array(vector, np.float64) - head.mean_D
        moved /= np.sqrt((moved**2).sum())
        odds = [np.exp(weight @ moved + bias) for weight, bias in zip(head.weight_KD, head.bias_K, strict=True)]
        measured = feature["properties"]["measurements"]
        for name, one in zip(CLASSES, odds, strict=True):
            assert measured[f"probability {name}"] == pytest.approx(one / sum(odds), abs=1e-5)


def test_a_run_id_names_the_probe_and_overlapping_tiles_average(root: Path, tmp_path: Path) -> None:
    store = open_store("", root / "runs")
    (entry,) = [one for one in store.client.search_runs([store.experiment_id("ca2cl")])
                if one.data.tags.get("ca2cl.kind") == "probe"]  # fmt: skip
    names = [file.path for file in store.client.list_artifacts(entry.info.run_id)]
    assert f"probe{SUFFIX}" in names and SOURCE_RUN_TAG in entry.data.tags
    assert run(settings(root, tmp_path, run=entry.info.run_id[:12], overlap=24, geojson="regions")) == 0
    regions = read_regions(tmp_path / "half.geojson")
    assert sorted(regions.classes) == CLASSES
    areas = {name: shape.area for name, shape in zip(regions.names, regions.shapes_M, strict=True)}
    assert regions.shapes_M[0].intersection(regions.shapes_M[1]).area == 0
    assert sum(areas.values()) == 480 * 288
    shares = json.loads((tmp_path / "heatmap.json").read_text())["slides"][0]["shares"]
    assert shares["coarse"] == pytest.approx(0.5, abs=0.06)  # one column of tiles lies over both halves
    assert shares["coarse"] == pytest.approx(areas["coarse"] / (480 * 288))
    counted = {f["properties"]["classification"]["name"]: f["properties"]["measurements"]["cells"]
               for f in features(tmp_path / "half.geojson")}  # fmt: skip
    assert sum(counted.values()) == 20 * 12  # between the edges of 19 x 11 tiles


def test_clusters_of_an_encoder_find_the_halves(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(settings(root, tmp_path, run=str(root / "encoder"), clusters=2)) == 0
    assert re.findall(r"^made  (.*)$", capsys.readouterr().out, re.M) == ["maps of 1 slide"]  # and no vectors
    found = boxes_and_names(tmp_path / "half.geojson")
    left, right = ({name for (x, _), name in found.items() if (x < 240) == side} for side in (True, False))
    assert {*left, *right} == {"cluster 1", "cluster 2"} and not left & right
    before = (tmp_path / "vectors.parquet").stat().st_mtime_ns
    assert run(settings(root, tmp_path, run=str(root / "encoder"), clusters=3)) == 0
    assert (tmp_path / "vectors.parquet").stat().st_mtime_ns == before
    assert len(set(boxes_and_names(tmp_path / "half.geojson").values())) == 3


def test_a_fine_tuned_classifier_has_its_own_classes(root: Path, tmp_path: Path) -> None:
    """Its head is not centred: here the probe's, with the mean in its bias, on the encoder's own features."""
    head, _ = read_head(root / f"probe{SUFFIX}")
    state = read_weights(root / "encoder" / "encoder.safetensors")
    scale = 50.0
    state["fc.weight"] = torch.from_numpy(head.weight_KD * scale).float()
    state["fc.bias"] = torch.from_numpy(head.bias_K - scale * head.weight_KD @ head.mean_D).float()
    card = replace(read_card(root / "encoder" / "card.json"), predicts=tuple(CLASSES), classes=tuple(CLASSES))
    folder = tmp_path / "tuned" / "cells" / "x" / "classifier"
    save_encoder(folder, state, card)
    (tmp_path / "tuned" / "finetune.json").write_text("{}")
    assert run(settings(root, tmp_path / "maps", run=str(tmp_path / "tuned"))) == 0
    found = boxes_and_names(tmp_path / "maps" / "half.geojson")
    assert np.mean([name == CLASSES[x >= 240] for (x, _), name in found.items()]) > 0.9
    assert find_scorer(settings(root, tmp_path, run=str(folder))).classes == tuple(CLASSES)


def test_two_processes_write_the_same_map(root: Path, maps: Path, tmp_path: Path) -> None:
    words = ["--mpp", str(MPP), "--tile", str(SIDE), "--tissue", "0", "--sharpness", "0", "--side", "400"]
    words += ["--workers", "0", "--device", "cpu", "--tracking.root", str(root / "runs"), "--out", "two"]
    done = ca2cl(tmp_path, "heatmap", str(root / "probe.json"), str(root / "half.svs"), *words, processes=2)
    assert done.returncode == 0, done.stderr
    assert "half" in done.stdout and "50.0 %" in done.stdout
    for name in ("half.png", "half.geojson", "vectors.parquet", "heatmap.json"):
        assert (maps / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_tiles_unlike_those_of_training_are_a_warning_with_both_numbers(root: Path, tmp_path: Path) -> None:
    scorer = find_scorer(settings(root, tmp_path))
    assert mismatches(scorer, SIDE, MPP) == []
    assert mismatches(scorer, 64, MPP) == [
        "tile is 64: the probe was trained on tiles of 48 x 48 pixels; use --tile 48"
    ]
    scorer = replace(scorer, card=None)
    (line,) = mismatches(scorer, SIDE, MPP)
    assert line.startswith("tile is 48: the encoder's input has 32 pixels, so that it sees 0.75 micrometres a pixel")
    scorer = replace(scorer, found=replace(scorer.found, card=replace(scorer.found.card, mpp=1.0)))
    assert mismatches(scorer, 32, 1.0) == []
    (line,) = mismatches(scorer, SIDE, MPP)
    assert line.startswith("mpp is 0.5: the encoder sees 0.75 micrometres a pixel (tiles of 48 pixels as 32), and was")
    assert line.endswith("trained at 1; use --mpp 0.667")


def test_without_mpp_that_of_the_card_is_taken(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(root / "encoder", tmp_path / "encoder")
    card = json.loads((tmp_path / "encoder" / "card.json").read_text())
    (tmp_path / "encoder" / "card.json").write_text(json.dumps({**card, "mpp": 1.0}))
    changes = {"run": str(tmp_path / "encoder"), "clusters": 2, "mpp": None}
    assert run(settings(root, tmp_path / "out", **changes)) == 0
    assert json.loads((tmp_path / "out" / "heatmap.json").read_text())["mpp"] == 1.0
    assert "mpp is 1: the encoder sees 1.5 micrometres" in caplog.text


def _white(root: Path) -> dict[str, Any]:
    write_svs(root / "white.svs", np.full((300, 300, 3), 245, np.uint8), MPP)
    return {"source": str(root / "white.svs"), "tissue": 0.5}


def _silent(root: Path) -> dict[str, Any]:
    write_svs(root / "silent.svs", tissue_picture(300, 300), None)
    return {"source": str(root / "silent.svs")}


def _other_weights(root: Path) -> dict[str, Any]:
    write_encoder(root / "other", factor=2.0)
    return {"encoder": str(root / "other")}


def _damaged(root: Path) -> dict[str, Any]:
    (root / f"torn{SUFFIX}").write_bytes((root / f"probe{SUFFIX}").read_bytes()[:200])
    return {"run": str(root / f"torn{SUFFIX}")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: {"run": "0123456789ab"}, "'0123456789ab'"),
        (lambda root: {"run": str(root / "nothing")}, "not there; give"),
        (lambda root: {"run": str(root / "encoder")}, "an encoder without classes; give a probe's run"),
        (lambda root: {"run": str(root / "encoder"), "clusters": 2, "mpp": None}, "mpp is not set, and the encoder's"),
        (lambda root: {"clusters": 1}, "clusters is 1"),
        (lambda root: {"tile": 8}, "tile is 8"),
        (lambda root: {"source": str(root / "encoder")}, "no slides here"),
        (_white, "no slide gave a tile, see .*; the first: white: all tiles dropped .background 36."),
        (_silent, "no slide gave a tile, see .*states no micrometres a pixel"),
        (_other_weights, "was fitted to other weights than those of .*other"),
        (_damaged, "torn-classifier.safetensors: not a probe's classifier"),
    ],
)
def test_bad_input_is_one_line(
    root: Path, tmp_path: Path, change: Callable[[Path], dict[str, Any]], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run(settings(root, tmp_path / "out", **change(root)))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.png"))


def test_a_probe_whose_epochs_the_test_tiles_chose_keeps_no_classifier(root: Path, tmp_path: Path) -> None:
    (tmp_path / f"p{SUFFIX}").write_bytes(b"of an earlier probe")
    changes = {"protocol": "original", "classifiers": ("sgd",), "labels": (1.0,), "output": str(tmp_path / "p.json")}
    assert probe(probing(root, **changes)) == 0
    assert not (tmp_path / f"p{SUFFIX}").exists()
    with pytest.raises(InputError, match=r"p-classifier.safetensors is not beside it; probe again"):
        run(settings(root, tmp_path / "out", run=str(tmp_path / "p.json")))
