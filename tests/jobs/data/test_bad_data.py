"""Bad data in whole jobs: replaced alike on every rank and told by key, or one line and exit code 2 on all of them."""

from __future__ import annotations

import io
import json
import os
import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.shards.index import INDEX_NAME, ShardIndex, write_index
from tests.support.jobs import Ranks
from tests.support.shards import encode, random_tiles, write_shards
from tests.support.stores import http_store

COMMON = (
    "--recipe", "smoke", "--tracking.register_as", "null", "--run.figures_every", "0", "--objective.adversary", "false",
    "--model.norm", "lane_group", "--model.norm_group", "4",
)  # fmt: skip


def bomb() -> bytes:
    """10^8 pixels in some kilobytes."""
    buffer = io.BytesIO()
    Image.new("1", (10**4, 10**4)).save(buffer, "PNG")
    return buffer.getvalue()


def broken_tiff(tile: np.ndarray) -> bytes:
    """Its directory lies behind the end."""
    whole = bytearray(encode(tile, "TIFF"))
    whole[4:8] = struct.pack("<I", len(whole) + 100)
    return bytes(whole)


def lie(root: Path, sample: int) -> None:
    """Let the index say that a sample lies 512 bytes further on than it does."""
    index = ShardIndex(root)
    parts = []
    for number, info in enumerate(index.shards):
        found = index.samples(number)
        offset = found.offset.copy()
        if number == index.locate(sample)[0]:
            offset[index.locate(sample)[1]] += 512
        parts.append((info, replace(found, offset=offset)))
    write_index(root / "new", parts)
    (root / "new").replace(root / INDEX_NAME)


BAD = {
    5: "JPEG does not decode", 17: "does not decode", 30: "16 x 16 pixels, expected 48 x 48", 52: "above the limit",
    77: "does not decode", 90: "does not decode",
}  # fmt: skip
"""The bad tiles' numbers, and their reasons."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 tiles, six of them bad in six ways, and a class without tiles."""
    encoded = [encode(tile, "JPEG") for tile in random_tiles(96, 48)]
    encoded[5] = encoded[5][: len(encoded[5]) // 2]
    encoded[17] = broken_tiff(random_tiles(1, 48)[0])
    encoded[30] = encode(random_tiles(1, 16)[0])
    encoded[52] = bomb()
    encoded[77] = b""
    labels = [i % 2 for i in range(96)]
    root = write_shards(
        tmp_path_factory.mktemp("data") / "bad", encoded, labels, classes=("a", "b", "empty"), tile_size=(48, 48)
    )
    lie(root, 90)
    return root


def bad_lines(run_dir: Path) -> list[tuple[int, str, str]]:
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return sorted((line["in_step"], line["key"], line["reason"]) for line in lines if line.get("event") == "bad_sample")


def ends(ranks: Ranks) -> str:
    """The one line with which all ranks end with exit code 2, told by the first."""
    found = ranks.wait()
    assert [code for code, _ in found] == [2] * len(found), found
    lines = [[line for line in text.splitlines() if line.startswith("ca2cl: error")] for _, text in found]
    assert [len(each) for each in lines] == [1] + [0] * (len(found) - 1), found
    assert not any("Traceback" in text for _, text in found), found
    return lines[0][0]


def run(folder: Path, shards: Path | str, name: str, *more: str, processes: int = 2) -> Ranks:
    arguments = [*COMMON, "--data.shards", str(shards), "--run.output_dir", str(folder / name), *more]
    arguments += ["--tracking.root", str(folder.parent / "store")]  # one for all tests: it takes seconds to make
    return Ranks(folder, *arguments, processes=processes)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run_dir / "checkpoints").glob("step-*"))[-1] / "model.safetensors")


def test_bad_tiles_are_replaced_alike_on_every_rank_and_told_by_key(shards: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        more = (
            "--run.accumulation",
            "bitwise",
            "--run.steps",
            "3",
            "--data.max_bad_rate",
            "0.1",
            "--data.workers",
            str(processes - 1),
        )
        found = run(tmp_path, shards, f"run{processes}", *more, processes=processes).wait()
        assert [code for code, _ in found] == [0] * processes, found
    one, two = (bad_lines(tmp_path / f"run{processes}") for processes in (1, 2))
    assert one == two
    met = {int(key[1:]): reason for _, key, reason in one}
    assert met.keys() == BAD.keys(), one  # three steps are one pass over all tiles
    for number, reason in BAD.items():
        assert reason in met[number], met
    expected, got = (weights(tmp_path / f"run{processes}") for processes in (1, 2))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_too_many_bad_tiles_end_every_rank_with_one_line(shards: Path, tmp_path: Path) -> None:
    line = ends(run(tmp_path, shards, "run", "--run.steps", "5", "--data.max_bad_rate", "0.01"))
    assert "data.max_bad_rate is 0.01: " in line and "samples could not be decoded (t000" in line


def many_shards(folder: Path) -> Path:
    tiles = random_tiles(640, 48)
    return write_shards(folder / "many", [encode(tile, "JPEG") for tile in tiles], per_shard=4, tile_size=(48, 48))


def read_late_by_rank_1(root: Path, step: int) -> set[str]:
    """Shards that are read by rank 1 of 2 from ``step`` on, and by nobody before."""
    index = ShardIndex(root)
    order = LaneOrder(index, 8, 32, 0)

    def read(steps: Sequence[int], ranks: Sequence[int]) -> set[int]:
        plans = [order.batch(step, rank, 2).samples for step in steps for rank in ranks]
        return {index.locate(int(sample))[0] for samples in plans for sample in samples}

    late = read(range(step, order.steps_per_epoch), [1]) - read(range(step), [0, 1])
    return {index.shards[number].name for number in late - read(range(order.steps_per_epoch), [0])}


@pytest.mark.slow
def test_a_shard_that_disappears_in_mid_run_ends_every_rank_with_one_line(tmp_path: Path) -> None:
    root = many_shards(tmp_path)
    late = read_late_by_rank_1(root, 4)
    assert len(late) > 10
    ranks = run(tmp_path, root, "run", "--run.steps", "100", "--data.workers", "0")
    deadline = time.monotonic() + 200
    journal = tmp_path / "run" / "journal.jsonl"
    while not (journal.exists() and '"step"' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for name in late:
        (root / name).unlink()
    began = time.monotonic()
    line = ends(ranks)
    assert time.monotonic() - began < 100  # four steps and the end of two processes, seconds on an idle machine
    assert "rank 1: " in line and "cannot be read (No such file or directory)" in line
    assert line.split("many/")[1].split(":")[0] in late


@pytest.mark.slow
def test_a_decoding_worker_that_is_killed_is_no_bad_input_on_any_rank(tmp_path: Path) -> None:
    """Nobody starts a job again that ended with 2. (torch may raise it on its rank at once, in a step: then the other
    knows no more than that it is alone.)"""
    ranks = run(tmp_path, many_shards(tmp_path), "run", "--run.steps", "1000", "--data.workers", "1")
    journal, other = tmp_path / "run" / "journal.jsonl", psutil.Process(ranks.started[1].pid)
    deadline = time.monotonic() + 200
    while not (journal.exists() and '"step"' in journal.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in other.children(recursive=True):
        worker.kill()
    ended = ranks.wait()
    assert [code for code, _ in ended] == [1, 1], ended
    assert "DataLoader worker" in ended[1][1]


@pytest.mark.slow
def test_a_remote_shard_that_one_rank_may_not_read_ends_every_rank_with_one_line(tmp_path: Path) -> None:
    root = many_shards(tmp_path)
    late = read_late_by_rank_1(root, 2)
    with http_store(root, fault=lambda name: "denied" if name in late else "") as (url, _):
        cache = ("--data.cache_dir", str(tmp_path / "cache"), "--run.steps", "100")
        line = ends(run(tmp_path, f"{url}?sig=token", "run", *cache))
    assert "rank 1: http://" in line and "may not be read (403" in line and "token" not in line


@pytest.mark.parametrize("damage", ["truncated", "index"])
def test_damage_that_is_there_at_the_start_is_one_line(shards: Path, tmp_path: Path, damage: str) -> None:
    root = tmp_path / "copy"
    root.mkdir()
    for path in shards.iterdir():
        os.link(path, root / path.name)
    target = root / (INDEX_NAME if damage == "index" else "shard-000003.tar")
    data: Any = target.read_bytes()
    target.unlink()
    target.write_bytes(data[: len(data) // 2])
    line = ends(run(tmp_path, root, "run", "--run.steps", "5"))
    assert target.name in line and ("truncated tar" if damage == "truncated" else "damaged index") in line
    assert not (tmp_path / "run").exists()
