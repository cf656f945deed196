"""What a test set shares with what a model has seen: found, named, tagged, and in the way of a promotion."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.data.fingerprints.seen import Seen, read_seen
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.detection.engines.base import CocoSplit
from ca2cl.detection.train.split_checks import find_shared
from ca2cl.evaluation.leaks.find import Side, find_leak
from ca2cl.evaluation.leaks.wording import lines, tag
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, read_card, save_encoder
from ca2cl.registry.evaluation_run import LEAK_TAG, TRAINED_ON_TEST
from ca2cl.reproduce.config import NctConfig, settled
from ca2cl.reproduce.table import notes
from tests.support.probes import run_probe

CARD = EncoderCard(arch="resnet18", feature_dim=512, input_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
SOURCE_RUN = "0123456789abcdef0123456789abcdef"


@dataclass(frozen=True)
class Known:
    """An encoder as far as its training data are concerned."""

    card: EncoderCard
    seen: Seen | None = None


def side(digest: str, groups: list[str | None], pixels: str, keys: str = "") -> Side:
    return Side(digest, list(keys), list(range(len(groups))), groups, [letter.encode() for letter in pixels])


def test_shared_slides_are_counted_and_named() -> None:
    train, test = side("1", ["a", "a", "b", None], "abcd"), side("2", ["b", "b", "c", None, "a"], "efghi")
    leak = find_leak(train, test)
    assert (leak["shared_slides"], leak["shared_slides_first"], leak["test_tiles_of_shared_slides"]) == (
        2,
        ["a", "b"],
        3,
    )
    assert lines(leak) == [
        "LEAK: train and test share 2 slides or patients (a, b), those of 3 of 5 test tiles; these scores say little "
        "about new tiles"
    ]
    assert tag(leak, "encoder") == {LEAK_TAG: "shared slides"}


def test_tiles_without_a_slide_share_none() -> None:
    for groups in ([None, None], ["c", None]):
        leak = find_leak(side("1", ["a", None], "ab"), side("2", groups, "cd"))
        assert lines(leak) == [] and tag(leak, "encoder") == {}


def test_equal_tiles_come_before_their_slides() -> None:
    leak = find_leak(side("1", ["a", "b"], "xy"), side("1", ["a", "b"], "xz"))
    assert (
        len(lines(leak)) == 1
        and "1 of 2 test tiles are training tiles too (train and test are the same" in lines(leak)[0]
    )
    assert tag(leak, "encoder") == {LEAK_TAG: "shared tiles"}


def test_an_encoder_that_was_trained_on_the_test_shards_is_found_by_any_of_its_digests() -> None:
    cards = {
        "encoder": Known(CARD),
        "pretrained": Known(dataclasses.replace(CARD, manifest_digest="2")),
        "tuned": Known(dataclasses.replace(CARD, manifest_digest="1", earlier_manifests=("0", "2"))),
    }
    leak = find_leak(side("1", [None], "a"), side("2", [None], "b"), name="other", encoders=cards)
    assert leak["trained_on_test"] == ["pretrained", "tuned"]
    assert lines(leak, "other")[0].startswith("LEAK: the test shards of other are training data of pretrained, tuned")
    assert tag(leak, "encoder") == {}, "the encoder's own scores are honest"
    assert tag(leak, "tuned") == {LEAK_TAG: TRAINED_ON_TEST}


def test_equal_keys_alone_are_a_warning_with_a_next_step(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(find_leak(side("1", [None], "a", "k"), side("2", [None], "b", "k"))) == []
    assert "possible LEAK: 1 keys" in caplog.text and "`ca2cl doctor --leaks TRAIN TEST`" in caplog.text


def test_what_an_earlier_version_found_is_still_told() -> None:
    assert lines({"same_manifest": False, "equal_test_tiles": 3}, "x") == [
        "LEAK: 3 test tiles of x are training tiles too; these scores say little about new tiles"
    ]
    assert lines({}) == [] and tag({"same_manifest": True}, "encoder") == {LEAK_TAG: "shared tiles"}


def test_a_card_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    save_encoder(tmp_path, build_encoder().state_dict(), dataclasses.replace(CARD, manifest_digest="1"))
    content = json.loads((tmp_path / "card.json").read_text())
    del content["earlier_manifests"]
    (tmp_path / "card.json").write_text(json.dumps(content))
    assert read_card(tmp_path / "card.json").manifests == ("1",)


def draw(root: Path, name: str, slides: range, seed: int) -> str:
    """Shards of two classes of noise, ``<class>/SLIDE<n>_<name><i>.png``."""
    generator = np.random.default_rng(seed)
    for number, label in enumerate("ab"):
        (root / f"{name}-tiles" / label).mkdir(parents=True)
        for slide in slides:
            for tile in range(3):
                pixels = generator.integers(0, 120, (32, 32, 3), np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(root / f"{name}-tiles" / label / f"SLIDE{slide}_{name}{tile}.png")
    out = root / name
    tiles = str(root / f"{name}-tiles")
    assert shard(ShardConfig(source=tiles, out=str(out), workers=1, group_pattern=r"SLIDE\d+")) == 0
    return str(out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train and test of the same slides, other slides, and an encoder that was trained on these others."""
    root = tmp_path_factory.mktemp("leakage")
    draw(root, "train", range(6), 0)
    draw(root, "test", range(2, 8), 1)
    other = draw(root, "other", range(20, 24), 2)
    torch.manual_seed(0)
    card = dataclasses.replace(CARD, source_run_id=SOURCE_RUN, manifest_digest=ShardIndex(other).manifest.digest)
    save_encoder(root / "encoder", build_encoder().state_dict(), card)
    return root


def test_a_probe_names_and_tags_shared_slides_and_resamples_slides(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, tags = run_probe(place, tmp_path, "test")
    printed = " ".join(capsys.readouterr().out.split())
    assert "LEAK: train and test share 4 slides or patients (SLIDE2, SLIDE3, SLIDE4, ...), those of 24 of 36" in printed
    assert "36 tiles of 6 slides or patients" in printed and "No verdict: there is a leak" in printed
    assert "whole slides or patients were resampled (6 of them)" in (tmp_path / "probe-details.txt").read_text()
    assert content["leak"]["shared_slides"] == 4 and content["resampled"]["units"] == 6
    assert (tags[LEAK_TAG], tags["ca2cl.resampled_by"]) == ("shared slides", "slide or patient")


def test_a_probe_names_and_tags_an_encoder_trained_on_the_test_shards(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, tags = run_probe(place, tmp_path, "other")
    assert "LEAK: the test shards are training data of encoder" in capsys.readouterr().out
    assert content["leak"]["trained_on_test"] == ["encoder"] and tags[LEAK_TAG] == TRAINED_ON_TEST


def test_the_first_test_set_is_the_one_that_tags(place: Path, tmp_path: Path) -> None:
    clean = draw(tmp_path, "clean", range(30, 33), 3)
    content, tags = run_probe(place, tmp_path, clean, "test")
    assert LEAK_TAG not in tags and [part["leak"]["shared_slides"] for part in content["tests"].values()] == [0, 4]


def test_the_authors_table_says_it_too() -> None:
    leak = find_leak(side("1", ["a"], "a"), side("2", ["a", "c"], "bc"), encoders={})
    facts = {"arch": "resnet18", "image_size": 224, "tiles": [1, 2], "test_tiles_published": 7180, "leak": leak}
    said = notes(settled(NctConfig(encoder="random", data="d")), facts, made_up=False)
    assert (
        sum(note.startswith("LEAK: train and test share 1 slides or patients (a), those of 1 of 2") for note in said)
        == 1
    )


def test_patients_and_images_of_both_splits_are_found(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for split, patients in (("train", ["1", "2"]), ("testA", ["2", "3"]), ("testB", ["4", "5"])):
        (tmp_path / split).mkdir()
        images = []
        for number, patient in enumerate(patients, start=1):
            pixels = generator.integers(0, 256, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / f"{split}_{number}.png")
            name = f"{split}_{number}.png"
            images.append({"id": number, "file_name": name, "height": 20, "width": 20, "patient_id": patient})
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "gland"}]}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    (tmp_path / "testB" / "testB_2.png").write_bytes((tmp_path / "train" / "train_1.png").read_bytes())
    splits = {name: CocoSplit.of(tmp_path, name) for name in ("testA", "testB")}
    found = find_shared(CocoSplit.of(tmp_path, "train"), splits)
    assert lines(found["testA"], "testA") == [
        "LEAK: train and test of testA share 1 slides or patients (2), those of 1 of 2 test images; these scores say "
        "little about new images"
    ]
    assert lines(found["testB"], "testB")[0].startswith("LEAK: 1 of 2 test images of testB are training images too;")


@pytest.mark.slow
def test_fine_tuning_says_it_and_hands_on_what_the_start_was_trained_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "finetune", "--encoder", str(place / "encoder"), "--train", str(place / "train"), "--against", "[]",
        "--test", str(place / "test"), "--output_dir", str(tmp_path / "job"), "--labels", "1.0", "--seeds", "1",
        "--epochs", "1", "--min_steps", "1", "--workers", "0", "--tracking.root", str(tmp_path / "store"),
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "LEAK: train and test share 4 slides" in capsys.readouterr().out
    (card,) = (tmp_path / "job" / "cells").glob("*/classifier/card.json")
    seen = read_card(card).manifests
    assert seen == tuple(ShardIndex(place / name).manifest.digest for name in ("other", "train"))
    kept = read_seen(card.parent)
    assert kept is not None and kept.manifests == seen[1:], "no file is with the encoder that it started from"
