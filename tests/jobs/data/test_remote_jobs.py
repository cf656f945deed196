"""Whole pre-trainings on remote shards give the weights of the local folder, however badly the store behaves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.jobs import Ranks
from tests.support.shards import encode, random_tiles, write_shards
from tests.support.stores import by_chance, http_store, s3_store, upload

COMMON = (
    "--recipe", "smoke", "--tracking.register_as", "null", "--run.figures_every", "1", "--run.steps", "6",
    "--objective.adversary", "false",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    encoded = [encode(tile, "JPEG") for tile in random_tiles(160, 48)]
    return write_shards(tmp_path_factory.mktemp("data") / "shards", encoded, per_shard=20, tile_size=(48, 48))


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return trained(tmp_path_factory.mktemp("local"), str(shards))


def trained(folder: Path, url: str, *more: str) -> dict[str, torch.Tensor]:
    """The weights after six steps on one process, which are more than one pass."""
    ((code, told),) = run(folder, url, *more).wait()
    assert code == 0, told
    return load_file(folder / "run" / "checkpoints" / "step-000000006" / "model.safetensors")


def run(folder: Path, url: str, *more: str) -> Ranks:
    where = ("--data.shards", url, "--data.cache_dir", str(folder / "cache"), "--run.output_dir", str(folder / "run"))
    where += ("--tracking.root", str(folder.parent / "store"))  # one for all tests: it takes seconds to make
    return Ranks(folder, *COMMON, *where, *more, processes=1)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_shards_on_s3_give_the_weights_of_the_local_folder(
    shards: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    with s3_store():
        assert_equal(trained(tmp_path, upload(shards, "s3://tiles/set"), "--data.workers", "2"), expected)


@pytest.mark.slow
def test_shards_on_a_bad_http_server_give_the_weights_of_the_local_folder(
    shards: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Connections cut at random bytes, 503 with and without Retry-After, silence; a cache of five shards of eight."""
    size = (shards / "shard-000000.tar").stat().st_size
    settings = ("--data.workers", "2", "--data.fetch_timeout", "2", "--data.cache_gb", str(5.5 * size / 1e9))
    faults = by_chance(4, ["cut", "cut", "stall", "later", "error"], most=1)
    with http_store(shards, fault=faults, patience=3) as (url, handler):
        assert_equal(trained(tmp_path, url, *settings), expected)
        tars = [name for name in handler.requests if name.endswith(".tar")]
    assert len(tars) > 8 + 4
    assert len(list((tmp_path / "cache").glob("*/shards/*"))) <= 5


@pytest.mark.slow
def test_a_server_that_is_gone_for_good_is_one_line(shards: Path, tmp_path: Path) -> None:
    left = [6]

    def fault(name: str) -> str:
        left[0] -= 1
        return "" if left[0] > 0 else "error"

    with http_store(shards, fault=fault) as (url, handler):
        job = run(tmp_path, url.replace("//", "//user:password@"), "--data.workers", "0", "--run.steps", "50")
        began = time.monotonic()
        ((code, told),) = job.wait()
    errors = [line for line in told.splitlines() if line.startswith("ca2cl: error")]
    assert code == 2 and len(errors) == 1 and time.monotonic() - began < 60, told
    assert "cannot be fetched after 5 attempts (503" in errors[0] and "password" not in told
    assert len(handler.requests) == 5 + 5
