"""``ca2cl probe`` with centres, shifts and two test sets of the same tiles, end to end."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape
from PIL import Image

from ca2cl.cli import main
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as shard
from ca2cl.evaluation.centers.shifts import SHIFTS, stain
from ca2cl.evaluation.centers.tables import tables
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.versions import EncoderVersion
from ca2cl.report.material import RunMaterial
from ca2cl.report.results import Result, results
from ca2cl.store.open import Store, open_store

SOURCE_RUN = "c24c" * 8
FEATURES = ["encoder", "random:1", "colour histogram", "random encoder"]
CENTERS, SLIDES, TILES = "AB", 2, 4


class Probed(NamedTuple):
    arguments: list[str]
    folder: Path
    printed: str
    content: dict[str, Any]


def draw(root: Path, seed: int, change: bool) -> None:
    """Three classes in two centres; that of centre B is darker. ``change`` shifts the stains of all."""
    generator = np.random.default_rng(seed)
    for channel, label in enumerate("xyz"):
        (root / label).mkdir(parents=True)
        for center in CENTERS:
            for slide in range(SLIDES):
                for number in range(TILES):
                    pixels = generator.integers(90, 200, (32, 32, 3), dtype=np.uint8)
                    pixels[..., channel] += 16
                    pixels = (pixels * (0.9 if center == "B" else 1.0)).astype(np.uint8)
                    if change:
                        pixels = stain(1.4, 0.6)(torch.from_numpy(pixels)[None])[0].numpy()
                    Image.fromarray(pixels).save(root / label / f"{center}-{seed % 10}{slide}_{number}.png")


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Probed:
    root = tmp_path_factory.mktemp("centers")
    for name, seed, change in (("train", 0, False), ("norm", 1, False), ("nonorm", 1, True)):
        draw(root / f"{name}-tiles", seed, change)
        config = ShardConfig(
            source=str(root / f"{name}-tiles"), out=str(root / name), workers=1, group_pattern=r"([AB]-\d+)_"
        )
        shard(config)
    torch.manual_seed(5)
    card = EncoderCard(
        arch="resnet18", feature_dim=512, input_size=32, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2),
        source_run_id=SOURCE_RUN,
    )  # fmt: skip
    save_encoder(root / "encoder", build_encoder("resnet18").state_dict(), card)
    arguments = [
        "probe", "--encoder", f"{root}/encoder", "--train", f"{root}/train", "--test", f"{root}/norm",
        f"{root}/nonorm", "--tracking.root", str(tmp_path_factory.getbasetemp() / "tracking-tests"),
        "--tracking.experiment", root.name, "--workers", "0", "--device", "cpu", "--seeds", "1",
        "--labels", "1.0", "--strength", "1.0", "--imagenet", "false",
        "--classifiers", "logistic", "knn", "--output", f"{root}/p.json",
    ]  # fmt: skip
    more = ["--against", "random:1", "--center", "/([AB])-", "--shifts", "true", "--slide_probe", "true"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*arguments, *more]) == 0
    return Probed(arguments, root, printed.getvalue(), json.loads((root / "p.json").read_text()))


def test_every_encoder_and_floor_has_its_indices(probed: Probed) -> None:
    norm, nonorm = probed.content["robustness"]["centers"]
    assert (norm["test"], nonorm["test"]) == ("norm", "nonorm")
    assert norm["centers"] == {"A": {"tiles": 24, "units": 2}, "B": {"tiles": 24, "units": 2}}
    assert [one["features"] for one in norm["indices"]] == FEATURES
    histogram = norm["indices"][2]
    assert histogram["ri"] < 0.5 and histogram["croma"] < 0 and histogram["croma_support"] == 1.0
    low, high = histogram["ri_interval_95"]
    assert low <= histogram["ri"] <= high
    row = next(line for line in probed.printed.splitlines() if line.startswith("random encoder") and line.endswith("%"))
    assert row.count("[") == 3


def test_accuracy_stands_beside_them_by_centre(probed: Probed) -> None:
    rows = probed.content["robustness"]["centers"][0]["accuracy"]
    assert [(row["features"], row["classifier"]) for row in rows] == [
        (name, classifier) for name in FEATURES for classifier in ("linear", "k-NN")
    ]
    results = {(r["features"], r["classifier"]): r["mean"]["accuracy"] for r in probed.content["results"]}
    for row in rows:
        assert sum(row["accuracy"].values()) / 2 == pytest.approx(results[row["features"], row["classifier"]])
        assert row["training_tiles"] == {"A": 24, "B": 24}


def test_the_centre_is_predicted_with_whole_slides_held_out(probed: Probed) -> None:
    probe = probed.content["robustness"]["centers"][0]["probe"]
    assert (probe["what"], probe["targets"], probe["chance"], probe["units"]) == ("centre", ["A", "B"], 0.5, 4)
    scores = {(one["features"], one["classifier"]): one["balanced_accuracy"] for one in probe["scores"]}
    assert scores["colour histogram", "linear"] == 1.0 and scores["class alone", "best guess"] == pytest.approx(0.5)
    assert {name for name, _ in scores} == {*FEATURES, "class alone"}
    slides, _ = probed.content["robustness"]["slide_probe"]
    assert len(slides["targets"]) == 4 and slides["chance"] == 0.25 and slides["tiles"] == 48
    assert "whole slides or patients held out; lower is more robust" in probed.printed
    assert "chance, 1 of 4" in probed.printed and "tiles held out within slides" in probed.printed


def test_the_same_tiles_of_two_sets_are_paired(probed: Probed) -> None:
    found = probed.content["robustness"]["drops"]
    assert [(one["features"], one["by"], one["tiles"]) for one in found[::2]] == [
        (name, "tile", 48) for name in FEATURES
    ]
    for one in found:
        first, other = (
            next(
                row["mean"]["accuracy"]
                for row in probed.content["tests"][test]["results"]
                if (row["features"], row["classifier"]) == (one["features"], one["classifier"])
            )
            for test in ("norm", "nonorm")
        )
        assert one["mean"] == pytest.approx(first - other)
        assert one["interval_95"][0] <= one["mean"] <= one["interval_95"][1]
    assert "nonorm: tiles of the same key and class, one by one" in probed.printed


def test_shifted_tiles_are_a_standing_second_set(probed: Probed) -> None:
    shifts = probed.content["robustness"]["shifts"]
    assert (shifts["test"], shifts["classifier"], shifts["budget"]) == ("norm", "linear", 1.0)
    assert list(shifts["settings"]) == [shift.name for shift in SHIFTS]
    assert len(shifts["scores"]) == len(FEATURES) * 13
    for name, clean in ((one["features"], one) for one in shifts["scores"] if one["family"] == "clean"):
        row = next(r for r in probed.content["results"] if (r["features"], r["classifier"]) == (name, "linear"))
        assert clean["accuracy"] == pytest.approx(row["seeds"][0]["accuracy"]) and clean["drop"] == 0
    for one in shifts["scores"]:
        clean = next(c for c in shifts["scores"] if (c["features"], c["family"]) == (one["features"], "clean"))
        assert one["drop"] == pytest.approx(clean["accuracy"] - one["accuracy"])
    assert Image.open(probed.folder / "p-shifts.png").width > 800


def test_the_run_has_the_numbers_and_the_plot(probed: Probed) -> None:
    store = open_store(None, Path(probed.arguments[probed.arguments.index("--tracking.root") + 1]))
    (run,) = store.client.search_runs([store.experiment_id(probed.folder.name)])
    robust = probed.content["robustness"]
    metrics = run.data.metrics
    norm, nonorm = robust["centers"]
    assert metrics["robustness/encoder/ri"] == pytest.approx(norm["indices"][0]["ri"])
    assert metrics["other_tests/nonorm/robustness/random_encoder/croma"] == pytest.approx(nonorm["indices"][3]["croma"])
    assert metrics["robustness/colour_histogram/center_probe/linear"] == 1.0
    assert "robustness/against/random-1/slide_probe/k-NN" in metrics
    assert metrics["other_tests/nonorm/robustness/encoder/drop/linear"] == pytest.approx(robust["drops"][0]["mean"])
    assert metrics["robustness/encoder/shift/JPEG_3/drop"] == pytest.approx(
        next(s["drop"] for s in robust["shifts"]["scores"] if (s["family"], s["strength"]) == ("JPEG", 3))
    )
    assert "p-shifts.png" in {entry.path for entry in store.client.list_artifacts(run.info.run_id)}


def _results(store: Store) -> list[Result]:
    entry = EncoderVersion("", "", SOURCE_RUN)
    return results(RunMaterial(run_id=SOURCE_RUN, name="", status="FINISHED", store=store, entry=entry))


def test_the_page_has_the_tables_of_the_file(probed: Probed) -> None:
    """JSON has null where a number is undefined, and the terminal printed the same cells."""
    robust = probed.content["robustness"]
    shown = tables(robust)
    store = open_store(None, Path(probed.arguments[probed.arguments.index("--tracking.root") + 1]))
    (run,) = store.client.search_runs([store.experiment_id(probed.folder.name)])
    (result,) = [one for one in _results(store) if one.run_id == run.info.run_id]
    pages = Environment(loader=PackageLoader("ca2cl.report", "templates"), autoescape=True, undefined=StrictUndefined)
    page = pages.get_template("result.html").render(result=result)
    for table in shown:
        assert str(escape(table.title)) in page and all(str(escape(note)) in page for note in table.notes)
    random = next(row for row in shown[0].rows if row[0] == "random encoder")
    assert "".join(f"<td>{cell}</td>" for cell in random) in page
    assert [table.title.partition(",")[0].partition(":")[0] for table in shown] == [
        "robustness to centres", "top-1 accuracy by centre", "centre predicted from the features",
        "robustness to centres", "top-1 accuracy by centre", "centre predicted from the features",
        "slide predicted from the features", "slide predicted from the features",
        "drop in top-1 accuracy from norm", "top-1 accuracy on shifted tiles of norm",
    ]  # fmt: skip
    for table in shown:
        assert table.text() in probed.printed
    blur = next(row for row in shown[-1].rows if row[:2] == ["random encoder", "blur"])
    scores = [s for s in robust["shifts"]["scores"] if s["features"] == "random encoder"]
    blurred = [s for s in scores if s["family"] in ("clean", "blur")]
    assert blur[2:6] == [f"{s['accuracy']:.3f}" for s in blurred] and blur[6].startswith(f"{blurred[-1]['drop']:+.3f}")
    robust["centers"][0]["indices"][0] |= {"ri": None, "ri_interval_95": [None, None], "support": None}
    assert tables(robust)[0].rows[0][1] == "undefined"
    assert tables({}) == []


def test_sets_are_centres(probed: Probed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--center", "set", "--floors", "false", "--output", f"{tmp_path}/p.json"]
    experiment = ["--tracking.experiment", "sets"]
    assert main([*probed.arguments, *experiment, *more]) == 0
    robust = json.loads((tmp_path / "p.json").read_text())["robustness"]
    (together,) = robust["centers"]
    assert together["test"] == "all test sets" and list(together["centers"]) == ["nonorm", "norm"]
    assert together["units"] == 4, "slides of both sets, in which a tile's copies are no neighbours of it"
    assert "accuracy" not in together and "all test sets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--center", "(["], "center is '([': not a regular expression"),
        (["--center", "/([XY])-"], "center is '/([XY])-': gives no tile of"),
        (["--center", "/"], "finds one centre, /"),
        (["--shifts", "true", "--classifiers", "knn"], "shifts is true: k-NN is not scored on shifted tiles"),
        (["--shifts", "true", "--protocol", "original"], "shifts is true: protocol original"),
    ],
)
def test_a_mistake_is_one_line(
    probed: Probed, more: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert main([*probed.arguments, *more]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: ") and words in line
