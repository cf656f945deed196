"""``ca2cl probe`` end to end where slides are known: two test sets, other encoders, every floor, both protocols."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.cli.parser import parse
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import name_sets, open_sets
from ca2cl.evaluation.linear_head import read_head
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.protocol import ORIGINAL_STATEMENT
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.downstream import downstream_runs
from ca2cl.store.open import open_store

SOURCE_RUN = "fedcba9876543210fedcba9876543210"
IMAGENET_FILE = "resnet18-f37072fd.pth"
SLIDES, TILES = 6, 5


class Workplace(NamedTuple):
    """Shards ``train``, ``norm/test`` and ``nonorm/test``, an encoder and ImageNet weights of our own making."""

    root: Path
    store: Path

    def arguments(self, folder: Path, *more: str) -> list[str]:
        sets = ["--train", f"{self.root}/train", "--test", f"{self.root}/norm/test", f"{self.root}/nonorm/test"]
        store = ["--tracking.root", str(self.store), "--tracking.experiment", folder.name]
        quick = ["--workers", "0", "--device", "cpu", "--seeds", "2", "--sgd_epochs", "5", "--image_size", "32"]
        return [
            "probe",
            "--encoder",
            f"{self.root}/encoder",
            *sets,
            *store,
            *quick,
            "--output",
            f"{folder}/p.json",
            *more,
        ]


def draw(root: Path, first_slide: int, slides: int, tint: int, seed: int) -> None:
    """Three classes of noisy colours, ``<class>/s<slide>_<n>.png``; every slide has all classes and a tint."""
    generator = np.random.default_rng(seed)
    for channel, name in enumerate("abc"):
        (root / name).mkdir(parents=True)
        for slide in range(first_slide, first_slide + slides):
            for number in range(TILES):
                pixels = generator.integers(0, 140, (32, 32, 3), dtype=np.uint8)
                pixels[..., channel] += 30 + tint
                pixels[..., 2] += 6 * (slide % 5)
                Image.fromarray(pixels).save(root / name / f"s{slide}_{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    root = tmp_path_factory.mktemp("sets")
    for name, tint, seed in (("train", 20, 0), ("norm/test", 20, 1), ("nonorm/test", 0, 2)):
        first, count = (0, SLIDES) if name == "train" else (50, 2)
        draw(root / f"{name}-tiles", first, count, tint, seed)
        groups = r"(s\d+)_"
        shard(ShardConfig(source=str(root / f"{name}-tiles"), out=str(root / name), workers=1, group_pattern=groups))
    torch.manual_seed(5)
    card = EncoderCard(
        arch="resnet18",
        feature_dim=512,
        input_size=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        source_run_id=SOURCE_RUN,
    )
    save_encoder(root / "encoder", build_encoder("resnet18").state_dict(), card)
    (root / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    heads = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    torch.save(
        {**build_encoder("resnet18").state_dict(), **heads}, root / "torch" / "hub" / "checkpoints" / IMAGENET_FILE
    )
    return Workplace(root, tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds


class Probed(NamedTuple):
    folder: Path
    printed: str
    details: str
    """The long tables."""
    content: dict[str, Any]


@pytest.fixture(scope="module")
def honest(place: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Probed:
    """A probe with everything in it."""
    return probed(place, tmp_path_factory.mktemp("honest"), "--labels", "5", "1.0", "--against", "random:1")


def probed(place: Workplace, folder: Path, *more: str) -> Probed:
    import contextlib
    import io

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("TORCH_HOME", str(place.root / "torch"))
        assert main(place.arguments(folder, *more)) == 0
    details = (folder / "p-details.txt").read_text()
    return Probed(folder, printed.getvalue(), details, json.loads((folder / "p.json").read_text()))


def test_every_encoder_and_floor_is_scored_on_both_test_sets(honest: Probed) -> None:
    tests = honest.content["tests"]
    assert list(tests) == ["norm-test", "nonorm-test"]
    for content in tests.values():
        assert [(row["features"], row["classifier"], row["budget"]) for row in content["results"]] == [
            (features, classifier, budget)
            for features in ("encoder", "random:1", "colour histogram", "random encoder", "ImageNet encoder")
            for classifier in ("linear", "linear SGD", "k-NN")
            for budget in (5.0, 1.0)
        ]
        assert content["data"]["tiles"] == 30 and content["leak"]["equal_test_tiles"] == 0
    assert honest.content["results"] == tests["norm-test"]["results"] != tests["nonorm-test"]["results"]
    assert honest.content["data"]["test"]["shards"].endswith("/norm/test")
    assert honest.content["against"]["random:1"]["uri"] == "random:1"
    named = re.findall("top-1 accuracy on ([a-z-]+): 30 tiles", honest.printed)
    assert named == ["norm-test", "nonorm-test"]
    lines = honest.details.splitlines()
    start = next(place for place, line in enumerate(lines) if "macro AUROC" in line)
    heads, _, first, second = lines[start : start + 4]
    column = heads.index("test ")
    assert first[column:].startswith("norm-test ") and second[column:].startswith("nonorm-test ")


def test_labels_are_drawn_and_held_out_by_slide(honest: Probed, place: Workplace) -> None:
    index = ShardIndex(place.root / "train")
    groups, labels = index.groups(), index.labels()
    for drawn in honest.content["labelled_tiles"]["5"]:
        assert len({groups[sample] for sample in drawn}) == 1, "five tiles a class are one slide's"
        assert np.bincount(labels[drawn]).tolist() == [5, 5, 5]
    assert honest.content["drawn_by"] == "slide or patient" and honest.content["config"]["strength"] == "auto"
    assert "labelled tiles drawn by slide or patient; strength auto" in honest.details
    sgd = honest.content["results"][3]
    assert (sgd["classifier"], sgd["labelled"]) == ("linear SGD", 90)
    assert all(seed["held_out"] in (15, 30) for seed in sgd["seeds"]), "one whole slide of six, or two"


def test_the_temperature_of_whole_slides_is_in_the_classifier_that_stays(honest: Probed) -> None:
    row = honest.content["results"][1]
    assert (row["classifier"], row["budget"]) == ("linear", 1.0) and honest.content["temperature_by"] != "tile"
    temperatures, (head, card) = (
        row["calibration"]["temperatures"],
        read_head(honest.folder / "p-classifier.safetensors"),
    )
    assert len(temperatures) == len(row["seeds"]) and card.setting["temperature"] == temperatures[0] != 1
    assert head.weight_KD.shape == (3, 512)
    assert "T was chosen on single tiles" not in honest.details
    assert "recall of  tiles  slides" in honest.details and "calibration: ECE" in honest.details
    assert {"balanced_accuracy", "macro_f1", "brier", "scaled_brier"} < set(row["intervals_95"])


def test_the_encoder_is_compared_with_everything_else(honest: Probed) -> None:
    found = honest.content["tests"]["nonorm-test"]["differences"]
    assert len(found) == 4 * 3 * 2
    assert {entry["against"] for entry in found} == {
        "random:1",
        "colour histogram",
        "random encoder",
        "ImageNet encoder",
    }
    results = honest.content["tests"]["nonorm-test"]["results"]
    mean = {(r["features"], r["classifier"], r["budget"]): r["mean"]["accuracy"] for r in results}
    for entry in found:
        ours, theirs = (mean[name, entry["classifier"], entry["budget"]] for name in ("encoder", entry["against"]))
        gain = ours - theirs
        assert entry["mean"] == pytest.approx(gain) and 0 <= entry["p"] <= 1
    assert "encoder less ImageNet encoder, k-NN, nonorm-test, 100 % labels: " in honest.details


def test_the_run_keeps_the_first_sets_names_and_hides_the_others(honest: Probed, place: Workplace) -> None:
    store = open_store(None, place.store)
    (run,) = store.client.search_runs([store.experiment_id(honest.folder.name)])
    metrics, tags = run.data.metrics, run.data.tags
    for prefix, name in (("", "norm-test"), ("other_tests/nonorm-test/", "nonorm-test")):
        accuracy = honest.content["tests"][name]["results"][1]["mean"]["accuracy"]
        assert metrics[f"{prefix}encoder/linear/100pct/accuracy"] == pytest.approx(accuracy)
        assert f"{prefix}encoder/linear_SGD/5_per_class/macro_f1" in metrics
        assert f"{prefix}difference/ImageNet_encoder/linear/100pct" in metrics
        assert f"{prefix}against/random-1/k-NN/100pct/accuracy" in metrics
    assert tags["ca2cl.test_manifest_digest"] == ShardIndex(place.root / "norm/test").manifest.digest
    assert json.loads(tags["ca2cl.other_test_manifest_digests"]) == {
        "nonorm-test": ShardIndex(place.root / "nonorm/test").manifest.digest
    }
    assert "ca2cl.protocol" not in tags
    assert (run.data.params["strength"], run.data.params["drawn_by"]) == ("auto", "slide or patient")
    (seen,) = (one for one in downstream_runs(store)[SOURCE_RUN] if one.run_id == run.info.run_id)
    scaled = sum(name.endswith("/temperature") for name in seen.scores())
    assert 0 < scaled <= 6 and len(seen.scores()) == 6 * (6 + 4) + scaled * (4 + 1), "scores, errors; scaled ones, T"
    assert all(name.startswith("encoder/") for name in seen.metrics)
    files = {entry.path for entry in store.client.list_artifacts(run.info.run_id)}
    pictures = {f"p-{kind}{test}.png" for kind in ("confusion", "reliability") for test in ("", "-nonorm-test")}
    assert files == {"p.json", "p-details.txt", "p-classifier.safetensors", *pictures}


def test_the_original_protocol_departs_and_says_so(place: Workplace, tmp_path: Path) -> None:
    found = probed(place, tmp_path, "--protocol", "original", "--labels", "1.0", "--floors", "false")
    assert ORIGINAL_STATEMENT in " ".join(found.printed.split())
    assert found.content["verdict"]["outcome"] == "none"
    assert "norm-test: No verdict: protocol original is for comparison" in found.printed
    assert found.content["protocol"] == {"name": "original", "statement": ORIGINAL_STATEMENT}
    assert found.content["drawn_by"] == "tile, with replacement"
    for drawn in found.content["labelled_tiles"]["1"]:
        assert len(drawn) == 90 and max(Counter(drawn).values()) > 1
    sgd = found.content["results"][1]
    assert [seed["held_out"] for seed in sgd["seeds"]] == [0, 0]
    store = open_store(None, place.store)
    (run,) = store.client.search_runs([store.experiment_id(tmp_path.name)])
    assert run.data.tags["ca2cl.protocol"] == ORIGINAL_STATEMENT
    (seen,) = (one for one in downstream_runs(store)[SOURCE_RUN] if one.run_id == run.info.run_id)
    assert seen.terms.protocol == "original" and str(seen.terms).endswith(", protocol original")


def test_without_imagenet_weights_the_table_goes_without_them(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Weights that cannot be read stand for a network that cannot be reached."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / IMAGENET_FILE).write_bytes(b"half a file")  # a KeyError in torch
    with caplog.at_level(logging.WARNING):
        code = main(
            place.arguments(tmp_path, "--labels", "1.0", "--draw_by", "tile", "--classifiers", "knn", "logistic")
        )
    assert code == 0 and caplog.text.count("no ImageNet floor in this table: encoder 'torchvision:IMAGENET1K_V1'") == 1
    content = json.loads((tmp_path / "p.json").read_text())
    assert {row["features"] for row in content["results"]} == {"encoder", "colour histogram", "random encoder"}
    assert [row["classifier"] for row in content["results"]] == ["linear", "k-NN"] * 3
    assert content["drawn_by"] == "tile" and content["config"]["strength"] == "auto"


def test_a_test_set_twice_is_refused(place: Workplace) -> None:
    train, test = str(place.root / "train"), str(place.root / "norm/test")
    with pytest.raises(InputError, match="norm/test and .*norm/./test are the same shards; give each once"):
        open_sets(train, [test, f"{place.root}/norm/./test"], None)


def test_every_test_set_is_searched_for_classes_and_leaks(
    place: Workplace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "tiles", 70, 1, 0, 3)
    (tmp_path / "tiles" / "a").rename(tmp_path / "tiles" / "z")
    shard(ShardConfig(source=str(tmp_path / "tiles"), out=str(tmp_path / "other"), workers=1))
    told = "classes differ between train and test: z only in .*other, and a only in .*train"
    with pytest.raises(InputError, match=told):
        open_sets(str(place.root / "train"), [str(place.root / "norm/test"), str(tmp_path / "other")], None)
    sets = ["--test", f"{place.root}/norm/test", f"{place.root}/train"]
    with caplog.at_level(logging.WARNING):
        more = ["--labels", "1.0", "--floors", "false", "--classifiers", "knn", *sets]
        assert main(place.arguments(tmp_path, *more)) == 0
    assert "LEAK: 90 of 90 test tiles of train are training tiles too (train and test are the same" in caplog.text
    tests = json.loads((tmp_path / "p.json").read_text())["tests"]
    assert [tests[name]["leak"]["equal_test_tiles"] for name in ("test", "train")] == [0, 90]


@pytest.mark.parametrize(
    ("roots", "names"),
    [
        (["shards/test"], ["test"]),
        (["shards/norm", "shards/nonorm/"], ["norm", "nonorm"]),
        (["a/x/test", "b/x/test"], ["a-x-test", "b-x-test"]),
        (["s3://bucket/A b/test", "./test"], ["A-b-test", "test"]),
        (["."], ["."]),
    ],
)
def test_sets_are_named_by_their_folders(roots: list[str], names: list[str]) -> None:
    assert name_sets(roots) == names


def test_one_test_set_or_several_on_the_command_line_and_in_a_file(tmp_path: Path) -> None:
    start = ["--encoder", "random", "--train", "t"]
    assert parse("probe", [*start, "--test", "a"]).tests == ("a",)
    assert parse("probe", [*start, "--test", "a", "b", "--seeds", "2"]).tests == ("a", "b")
    for text, tests in (("test: a", ("a",)), ("test: [a, b]", ("a", "b"))):
        (tmp_path / "probe.yaml").write_text(f"encoder: random\ntrain: t\n{text}\n")
        assert parse("probe", ["--config", str(tmp_path / "probe.yaml")]).tests == tests
    assert parse("probe", [*start, "--test", "a", "--strength", "auto"]).strength == "auto"
    assert parse("probe", [*start, "--test", "a", "--strength", "0.5", "--classifiers", "sgd"]).classifiers == ("sgd",)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--classifiers", "svm"], "classifiers"),
        (["--classifiers", "sgd", "sgd"], "classifiers names one twice: sgd, sgd"),
        (["--classifiers"], "classifiers is empty"),
        (["--test"], "test is empty"),
        (["--test", "a", "a"], "test names one twice: a, a"),
        (["--against", "random"], "against names one encoder twice, or the encoder itself"),
        (["--draw_by", "slide"], "draw_by"),
        (["--protocol", "theirs"], "protocol"),
        (["--strength", "-1"], "strength is -1"),
        (["--strength", "0"], "strength is 0"),
        (["--strength", "much"], "strength"),
        (["--strength", ".nan"], "strength is nan"),
        (["--sgd_lr", "0"], "sgd_lr is 0"),
        (["--sgd_epochs", "0"], "sgd_epochs is 0"),
    ],
)
def test_a_mistake_is_one_line(more: list[str], words: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--encoder", "random", "--train", "t", "--test", "u", *more]) == 2
    out, error = capfd.readouterr()
    (line,) = error.splitlines()
    assert line.startswith("ca2cl: error: ") and words in line and not out


def test_a_rival_that_is_not_there_is_one_line(
    place: Workplace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(place.arguments(tmp_path, "--against", "/nowhere")) == 2
    assert "encoder '/nowhere': not there" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_settings_keep_their_meaning_in_python() -> None:
    assert ProbeConfig(encoder="random", train="a", test="b").tests == ("b",)
    assert ProbeConfig(encoder="random", train="a", test=("b", "c")).tests == ("b", "c")
