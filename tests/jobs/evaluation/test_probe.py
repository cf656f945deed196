"""``ca2cl probe`` end to end on made-up tissue: real shards, a real encoder, a real store."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, TrackingConfig
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import missing_classes, open_sets
from ca2cl.evaluation.probe.run import ProbeConfig, run
from ca2cl.evaluation.splits import labelled_subset
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.evaluation_run import SOURCE_RUN_TAG
from ca2cl.store.open import open_store

SOURCE_RUN = "0123456789abcdef0123456789abcdef"
TRAIN_TILES, TEST_TILES = 12, 6


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders and shards of train and test, and an encoder's folder."""
    root = tmp_path_factory.mktemp("probe")
    for name, count, seed in (("train", TRAIN_TILES, 0), ("test", TEST_TILES, 1)):
        write_tissue(root / f"{name}-tiles", count, size=48, seed=seed)
        assert shard(ShardConfig(source=str(root / f"{name}-tiles"), out=str(root / name), workers=1)) == 0
    torch.manual_seed(5)
    encoder = build_encoder("resnet18")
    card = EncoderCard(
        arch="resnet18",
        feature_dim=512,
        input_size=32,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        source_run_id=SOURCE_RUN,
    )
    save_encoder(root / "encoder", encoder.state_dict(), card)
    return root


def config(tissue: Path, folder: Path, **changes: object) -> ProbeConfig:
    settings: dict[str, object] = {
        "encoder": str(tissue / "encoder"),
        "train": str(tissue / "train"),
        "test": str(tissue / "test"),
        "labels": (0.5, 1.0),
        "seeds": 2,
        "workers": 0,
        "device": "cpu",
        "imagenet": False,  # no network in tests
        "output": str(folder / "out" / "probe.json"),
        # one database for the module: making one takes seconds
        "tracking": TrackingConfig(root=str(tissue / "runs"), experiment=folder.name),
    }
    return ProbeConfig(**{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def probed(tissue: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A finished probe: the folder it wrote to, and its JSON."""
    folder = tmp_path_factory.mktemp("probed")
    assert run(config(tissue, folder)) == 0
    return folder, json.loads((folder / "out" / "probe.json").read_text())


def test_encoder_and_floors_stand_in_one_table(probed: tuple[Path, dict]) -> None:
    _, content = probed
    assert [(row["features"], row["classifier"], row["budget"]) for row in content["results"]] == [
        (features, classifier, budget)
        for features in ("encoder", "colour histogram", "random encoder")
        for classifier in ("linear", "linear SGD", "k-NN")
        for budget in (0.5, 1.0)
    ]
    assert [row["labelled"] for row in content["results"][:2]] == [9 * TRAIN_TILES // 2, 9 * TRAIN_TILES]
    for row in content["results"]:
        assert all(np.sum(seed["confusion"]) == 9 * TEST_TILES for seed in row["seeds"])
        assert all(np.sum(seed["confusion"], 1).tolist() == [TEST_TILES] * 9 for seed in row["seeds"])


def test_labels_stay_with_their_tiles_through_the_whole_pipeline(tissue: Path, tmp_path: Path) -> None:
    """Three colours: any tile that meets another's label costs accuracy."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for channel, name in enumerate(("blue", "green", "red")):
            folder = tmp_path / f"{split}-tiles" / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (40, 40, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 120
                Image.fromarray(pixels).save(folder / f"{split}{number}.png")
        shard(ShardConfig(source=str(tmp_path / f"{split}-tiles"), out=str(tmp_path / split), workers=1))
    shards = {split: str(tmp_path / split) for split in ("train", "test")}
    assert run(config(tissue, tmp_path, **shards, labels=(1.0, 6.0), batch_size=5)) == 0
    for row in json.loads((tmp_path / "out" / "probe.json").read_text())["results"]:
        assert row["mean"]["accuracy"] == 1, row
        assert row["seeds"][0]["confusion"] == (5 * np.eye(3)).tolist()


def test_the_json_says_what_was_probed_on_what(probed: tuple[Path, dict], tissue: Path) -> None:
    _, content = probed
    train, test = ShardIndex(tissue / "train"), ShardIndex(tissue / "test")
    assert content["encoder"]["source_run_id"] == SOURCE_RUN
    assert content["encoder"]["image_size"] == 32
    assert content["data"]["train"]["manifest_digest"] == train.manifest.digest
    assert content["data"]["test"]["tiles"] == 9 * TEST_TILES
    assert content["data"]["test"]["unlabelled"] == 0 and content["data"]["test"]["undecodable"] == {}
    assert content["data"]["test"]["manifest_digest"] == test.manifest.digest
    assert content["classes"] == train.classes
    assert content["config"]["knn"] == 20
    assert content["leak"]["same_manifest"] is False and content["leak"]["equal_test_tiles"] == 0
    labels = train.labels()
    drawn = content["labelled_tiles"]["0.5"][1]
    assert drawn == labelled_subset(labels, 0.5, 1).tolist()
    assert np.bincount(labels[drawn]).tolist() == [TRAIN_TILES // 2] * 9
    assert content["labelled_tiles"]["1"] == ["all", "all"]


def test_the_result_is_a_run_with_its_files_and_its_source(probed: tuple[Path, dict], tissue: Path) -> None:
    folder, content = probed
    store = open_store(None, tissue / "runs")
    (logged,) = store.client.search_runs([store.experiment_id(folder.name)])
    assert logged.info.status == "FINISHED"
    assert logged.data.tags[SOURCE_RUN_TAG] == SOURCE_RUN
    assert (
        logged.data.tags["ca2cl.verdict"]
        == content["verdict"]["sentence"]
        == content["tests"]["test"]["verdict"]["sentence"]
    )
    assert f"**{content['verdict']['sentence']}**" in logged.data.tags["mlflow.note.content"]
    assert logged.data.tags["ca2cl.test_manifest_digest"] == ShardIndex(tissue / "test").manifest.digest
    accuracy = content["results"][1]["mean"]["accuracy"]
    assert logged.data.metrics["encoder/linear/100pct/accuracy"] == pytest.approx(accuracy)
    files = sorted(entry.path for entry in store.client.list_artifacts(logged.info.run_id))
    assert (
        files
        == [
            f"probe{end}"
            for end in ("-classifier.safetensors", "-confusion.png", "-details.txt", "-reliability.png", ".json")
        ]
        == sorted(p.name for p in (folder / "out").iterdir())
    )


def test_the_same_probe_gives_the_same_numbers(
    probed: tuple[Path, dict], tissue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config(tissue, tmp_path, floors=False, workers=2, batch_size=7, output=None)) == 0
    (path,) = (tissue / "runs").glob(f"probe-{SOURCE_RUN}-*.json")
    again = json.loads(path.read_text())["results"]
    assert len(again) == 6
    for mine, theirs in zip(again, probed[1]["results"], strict=False):
        assert mine["mean"]["accuracy"] == pytest.approx(theirs["mean"]["accuracy"], abs=0.02)
    printed = capsys.readouterr().out
    assert printed.startswith("top-1 accuracy on test: 54 tiles, mean of 2 draws of labels; chance 0.111")
    assert "compared with nothing else." in printed and "tiles count as independent" in printed
    assert str(path) in printed and "-details.txt (the long tables" in printed and "MLflow run" in printed
    assert "macro AUROC" not in printed and "calibration" not in printed
    assert max(map(len, printed.partition("all numbers")[0].splitlines())) < 80


def test_probing_on_the_training_tiles_is_called_a_leak(
    tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(config(tissue, tmp_path, test=str(tissue / "train"), floors=False, labels=(1.0,), seeds=1))
    assert "LEAK: 108 of 108 test tiles" in caplog.text
    leak = json.loads((tmp_path / "out" / "probe.json").read_text())["leak"]
    assert (leak["same_manifest"], leak["shared_keys"], leak["equal_test_tiles"]) == (True, 108, 108)


def test_a_copied_tile_under_another_name_is_found(
    tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tissue / "test-tiles", tmp_path / "tiles")
    tile = next((tissue / "train-tiles" / "TUM").iterdir())
    shutil.copy(tile, tmp_path / "tiles" / "TUM" / "renamed.png")
    shard(ShardConfig(source=str(tmp_path / "tiles"), out=str(tmp_path / "test"), workers=1))
    with caplog.at_level(logging.WARNING):
        run(config(tissue, tmp_path, test=str(tmp_path / "test"), floors=False, labels=(1.0,), seeds=1))
    leak = json.loads((tmp_path / "out" / "probe.json").read_text())["leak"]
    assert (leak["same_manifest"], leak["shared_keys"], leak["equal_test_tiles"]) == (False, 0, 1)
    assert "LEAK: 1 of 55 test tiles" in caplog.text


def test_a_tile_that_does_not_decode_is_left_out_and_named(
    tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(tissue / "test", tmp_path / "test")
    index = ShardIndex(tmp_path / "test")
    samples, tar = index.samples(0), tmp_path / "test" / index.shards[0].name
    content = bytearray(tar.read_bytes())
    content[int(samples.offset[3]) : int(samples.offset[3]) + 16] = bytes(16)
    tar.write_bytes(content)
    run(config(tissue, tmp_path, test=str(tmp_path / "test"), floors=False, labels=(1.0,), seeds=1))
    described = json.loads((tmp_path / "out" / "probe.json").read_text())["data"]["test"]
    assert list(described["undecodable"]) == [samples.key[3]]
    assert described["tiles"] == 9 * TEST_TILES - 1
    assert f"1 tiles could not be decoded and are left out, {samples.key[3]}" in caplog.text


def reshard(source: Path, target: Path, *, without: str = "", unlabelled: bool = False) -> str:
    """Shards of ``source`` without one class, or without labels."""
    shutil.copytree(source, target / "tiles")
    if without:
        shutil.rmtree(target / "tiles" / without)
    shard(ShardConfig(source=str(target / "tiles"), out=str(target / "shards"), workers=1, unlabelled=unlabelled))
    return str(target / "shards")


def test_classes_that_train_lacks_are_named(tissue: Path, tmp_path: Path) -> None:
    train = reshard(tissue / "train-tiles", tmp_path, without="TUM")
    with pytest.raises(InputError, match=f"classes differ between train and test: TUM only in {tissue / 'test'};"):
        open_sets(train, [str(tissue / "test")], None)


def test_a_test_set_that_lacks_classes_is_numbered_as_train_is(tissue: Path, tmp_path: Path) -> None:
    """A cohort need not have every class; without the first one, folders of the rest have other numbers."""
    first, *others = ShardIndex(tissue / "train").classes
    test = reshard(tissue / "test-tiles", tmp_path, without=first)
    assert ShardIndex(test).classes == others
    train, alike = open_sets(str(tissue / "train"), [test], None)
    for index in (alike, copy.copy(alike)):  # as pickling rebuilds it in decoding workers
        assert index.classes == train.classes
        named = {key: index.classes[label] for part in index for key, label in zip(part.key, part.label, strict=True)}
        assert named and all(key.startswith(f"{name}~") for key, name in named.items())
    assert missing_classes(alike.labels(), alike.classes) == [first]


def test_unlabelled_shards_are_refused(tissue: Path, tmp_path: Path) -> None:
    test = reshard(tissue / "test-tiles", tmp_path, unlabelled=True)
    with pytest.raises(InputError, match=f"{test}: the tiles have no labels; shard a tree with one folder a class"):
        open_sets(str(tissue / "train"), [test], None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder": "f" * 32}, "f" * 32),
        ({"encoder": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"train": "/nowhere"}, "/nowhere"),
        ({"device": "cuda:77"}, "device is 'cuda:77'"),
        ({"output": "/dev/null/probe.json"}, "output is '/dev/null/probe.json'"),
    ],
)
def test_what_is_not_there_is_one_line(tissue: Path, tmp_path: Path, changes: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        run(config(tissue, tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": (0.1, 0.0)}, "labels is 0.0"),
        ({"labels": (1.5,)}, "labels is 1.5"),
        ({"labels": ()}, "labels is empty"),
        ({"seeds": 0}, "seeds is 0: use 1 or more"),
        ({"knn": 0}, "knn is 0"),
        ({"image_size": 8}, "image_size is 8"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ProbeConfig(encoder="random", train="a", test="b", **changes)  # type: ignore[arg-type]
