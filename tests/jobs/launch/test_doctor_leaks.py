"""``ca2cl doctor --leaks``: what two sets of shards share, and ``shard --groups``, which puts it right."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from ca2cl.cli import main
from ca2cl.data.shards.index import ShardIndex


def save(folder: Path, names: list[str], seed: int) -> None:
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name in names:
        field = (
            gaussian_filter(generator.normal(size=(112, 112)), 3) * 9
            + gaussian_filter(generator.normal(size=(112, 112)), 9) * 20
        )
        pixels = 150 + 40 * np.stack([field, field * 1.5, field], -1)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    """Train of slides S0 to S3, and test with a mirrored JPEG of a tile of S1, an equal tile of S2, and new ones."""
    save(tmp_path / "a" / "x", [f"S{slide}-{tile}" for slide in range(4) for tile in range(3)], 0)
    save(tmp_path / "b" / "x", [f"T{slide}-{tile}" for slide in range(3) for tile in range(3)], 1)
    first = Image.open(tmp_path / "a" / "x" / "S1-0.png")
    first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "b" / "x" / "T7-0.jpg", quality=60)
    Image.open(tmp_path / "a" / "x" / "S2-1.png").save(tmp_path / "b" / "x" / "T8-0.bmp")
    for name in "ab":
        shard(tmp_path, name, name)
    return tmp_path


def shard(root: Path, tiles: str, out: str, *more: str) -> None:
    words = ["shard", str(root / tiles), str(root / "shards" / out), "--workers", "1", "--group_pattern", "[ST][0-9]"]
    assert main([*words, *more]) == 0


def leaks(root: Path, a: str, b: str) -> int:
    shards = root / "shards"
    out = str(root / "leaks")
    return main(["doctor", "--leaks", str(shards / a), str(shards / b), "--leaks_output", out, "--workers", "0"])


def test_pairs_become_groups(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaks(sets, "a", "b") == 1
    printed = capsys.readouterr().out
    assert "LEAK: 1 of 11 tiles of B are in A as equal pixels (x~T8-0), in 1 pairs" in printed
    assert "LEAK: 1 of 11 tiles of B are in A as altered copies (x~T7-0), in 1 pairs" in printed
    found = {(row["key_a"], row["key_b"], row["equal_pixels"]) for row in rows(sets / "leaks" / "pairs.csv")}
    assert found == {("x~S1-0", "x~T7-0", "0"), ("x~S2-1", "x~T8-0", "1")}
    assert json.loads((sets / "leaks" / "leaks.json").read_text())["pairs"] == 2
    with Image.open(sets / "leaks" / "pairs.png") as sheet:
        assert sheet.width > 300
    moved = {row["key"]: row["group"] for row in rows(sets / "leaks" / "groups-b.csv")}
    assert moved == {"x~T7-0": "S1", "x~T8-0": "S2"}
    shard(sets, "b", "again", "--groups", str(sets / "leaks" / "groups-b.csv"))
    index = ShardIndex(sets / "shards" / "again")
    groups = {key: group for part in index for key, group in zip(part.key[:], part.group[:], strict=True)}
    assert (groups["x~T7-0"], groups["x~T8-0"], groups["x~T0-0"]) == ("S1", "S2", "T0")
    assert leaks(sets, "a", "again") == 1
    assert "A and B share 2 slides or patients (S1, S2)" in capsys.readouterr().out


def test_one_set_is_compared_with_itself(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaks(sets, "b", "b") == 0
    assert "no slide and no tile in common" in capsys.readouterr().out


def test_groups_of_other_tiles_are_refused(sets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = sets / "wrong.csv"
    words = ["shard", str(sets / "b"), str(sets / "shards" / "c"), "--groups", str(wrong)]
    for text, said in (("key,group\nother,S1\n", "names no tile of b"), ("name\n", "has no columns key and group")):
        wrong.write_text(text)
        assert main(words) == 2
        assert said in capsys.readouterr().err
