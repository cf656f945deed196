"""Planted contamination by pre-training data is named by every verb, and a clean set by none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ca2cl.cli import main
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.data.fingerprints.seen import write_seen
from ca2cl.data.fingerprints.survey import see
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.shards.run import run as shard
from ca2cl.evaluation.leaks.find import find_leak, side_of
from ca2cl.evaluation.leaks.wording import lines, tag
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, save_encoder
from ca2cl.registry.evaluation_run import LEAK_TAG, TRAINED_ON_SLIDES, TRAINED_ON_TILES
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.report.tiles import read_tiles
from ca2cl.reproduce.config import NctConfig
from ca2cl.reproduce.data_summary import find_facts
from tests.support.probes import run_probe

CARD = EncoderCard(arch="resnet18", feature_dim=512, input_size=32, mean=IMAGENET_MEAN, std=IMAGENET_STD)
SOURCE_RUN = "0123456789abcdef0123456789abcdef"


def draw(root: Path, name: str, slides: list[int], seed: int, per_class: int = 1) -> Path:
    """Tiles of two classes of coarse noise, ``<class>/SLIDE<n>_<i>.png``."""
    generator = np.random.default_rng(seed)
    for number, label in enumerate("ab"):
        folder = root / f"{name}-tiles" / label
        folder.mkdir(parents=True)
        for slide in slides:
            for tile in range(per_class):
                pixels = generator.integers(0, 120, (16, 16, 3), np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).resize((32, 32)).save(folder / f"SLIDE{slide}_{name}{tile}.png")
    return root / f"{name}-tiles"


def sharded(root: Path, tiles: Path, name: str, pattern: str | None = r"SLIDE\d+") -> str:
    assert shard(ShardConfig(source=str(tiles), out=str(root / name), workers=1, group_pattern=pattern)) == 0
    return str(root / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that was trained on 20 slides, whose shards are gone, and test sets with and without them."""
    root = tmp_path_factory.mktemp("seen")
    sharded(root, draw(root, "train", list(range(6)), 0), "train")
    pre = draw(root, "pre", list(range(20, 40)), 1)
    sharded(root, pre, "pre")
    sharded(root, draw(root, "four", [*range(40, 56), 20, 21, 22, 23], 2), "four")
    sharded(root, draw(root, "clean", list(range(60, 80)), 3), "clean")
    for path in sorted(pre.glob("*/SLIDE2*.png")):  # ten slides of them, under other names and as JPEG
        copied = root / "copied-tiles" / path.parent.name / f"x{path.stem[5:]}.jpg"
        copied.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(copied, quality=70)
    for path in sorted((root / "clean-tiles").glob("*/*.png")):
        Image.open(path).save(root / "copied-tiles" / path.parent.name / path.name)
    sharded(root, root / "copied-tiles", "copied", None)
    index = ShardIndex(root / "pre")
    torch.manual_seed(0)
    card = dataclasses.replace(CARD, source_run_id=SOURCE_RUN, manifest_digest=index.manifest.digest)
    save_encoder(root / "encoder", build_encoder().state_dict(), card)
    write_seen(root / "encoder", see(index, ShardReader(root / "pre", index=index), workers=0))
    return root


NAMED = "(SLIDE20, SLIDE21, SLIDE22, ...)"
FOUR = f"encoder was trained on 4 slides or patients of the test set of four {NAMED}, those of 8"
COPIED = "encoder was trained on 20 of 60 test tiles of copied (a~x20_pre0, a~x21_pre0, a~x22_pre0, ...), 20 of them as"


def probe_on(place: Path, folder: Path, *tests: str) -> tuple[dict[str, Any], str]:
    """The JSON, and the tag of the MLflow run."""
    content, tags = run_probe(place, folder, *tests)
    return content, tags.get(LEAK_TAG, "")


def test_a_probe_names_slides_copies_and_the_very_shards(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, leak = probe_on(place, tmp_path, "copied", "four", "pre", "clean")
    printed = capsys.readouterr().out
    named = [" ".join(note.split()) for note in printed.split("\n\n") if "LEAK" in note]
    assert len(named) == 3 and leak == TRAINED_ON_TILES
    assert f"LEAK: {COPIED} altered copies; " in named[0]
    assert f"LEAK: {FOUR} of 40 test tiles of four; " in named[1]
    assert "the test shards of pre are training data of encoder" in named[2]
    assert tag(content["tests"]["four"]["leak"], "encoder") == {LEAK_TAG: TRAINED_ON_SLIDES}
    clean = content["tests"]["clean"]["leak"]["pretraining"]["encoder"]
    assert (clean["slides"], clean["equal_test_tiles"], clean["copied_test_tiles"]) == (0, 0, 0)


def test_an_encoder_without_the_file_says_what_is_not_known(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = (
        side_of(ShardIndex(place / name), ShardReader(place / name, index=ShardIndex(place / name)), name, workers=0)
        for name in ("train", "copied")
    )
    found = dataclasses.replace(resolve_encoder(str(place / "encoder")), seen=None)
    leak = find_leak(train, test, encoders={"encoder": found})
    assert lines(leak) == [] and "not known which slides and tiles encoder has seen of shards" in caplog.text


def test_embed_names_them(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, line in (
        (
            "four",
            f"LEAK: the encoder was trained on 4 slides or patients of the source {NAMED}",
        ),
        ("copied-tiles", "LEAK: the encoder was trained on 20 of 60 tiles (a~x20_pre0, "),
        ("pre", "LEAK: the encoder was trained on these very shards, by their digest"),
        ("clean", ""),
    ):
        out = str(tmp_path / f"{name}.parquet")
        assert main(["embed", "--encoder", str(place / "encoder"), str(place / name), out, "--workers", "0"]) == 0
        printed = capsys.readouterr().out
        assert line in printed if line else "LEAK" not in printed


def test_the_reproduced_tables_and_the_page_name_them(place: Path, tmp_path: Path) -> None:
    found = resolve_encoder(str(place / "encoder"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "NCT-CRC-HE-100K").symlink_to(place / "train")
    (tmp_path / "data" / "CRC-VAL-HE-7K").symlink_to(place / "copied")
    config = NctConfig(encoder="x", data=str(tmp_path / "data"), output_dir=str(tmp_path / "out"), workers=0)
    config.out.mkdir()
    part = find_facts(config, found)["leak"]["pretraining"]["encoder"]
    assert (part["copied_test_tiles"], part["test_tiles_first"][0]) == (20, "a~x20_pre0")
    for name, count in (("copied", 1), ("four", 1), ("clean", 0)):
        index = ShardIndex(place / name)
        tiles = read_tiles(
            found, str(place / name), index, count=60, seed=0, device=torch.device("cpu"), workers=0, cache_dir=None,
            test=True,
        )  # fmt: skip
        assert len(tiles.seen) == count, name
