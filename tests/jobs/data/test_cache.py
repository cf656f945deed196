"""The cache of remote shards: its cap, processes that share it, kills in the middle, a full disk, real stores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from ca2cl.data.loading.order import LaneOrder
from ca2cl.data.loading.stream import LaneStream
from ca2cl.data.remote.cache import GB
from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from tests.support.forked import CONTEXT
from tests.support.jobs import ROOT
from tests.support.shards import encode, random_tiles, write_shards
from tests.support.stores import FaultyHandler, by_chance, gs_store, http_store, in_turn, s3_store, upload

QUICK = FetchPolicy(attempts=5, timeout=30.0, pause=0.01)
TILES = random_tiles(80)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of ten tiles, all of one size."""
    return write_shards(tmp_path_factory.mktemp("data") / "shards", [encode(tile, "BMP") for tile in TILES], ext="bmp")


@pytest.fixture
def served(shards: Path) -> Iterator[tuple[str, type[FaultyHandler]]]:
    with http_store(shards) as store:
        yield store


def size_of(shards: Path) -> int:
    return (shards / "shard-000000.tar").stat().st_size


def cached(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("*/shards/*"))


def keys(root: str | Path, cache: Path, *, workers: int = 0, rank: int = 0, world: int = 1) -> list[list[str]]:
    """The keys of 12 batches, after a look at their pixels."""
    index = open_index(root, cache, QUICK)
    reader = ShardReader(root, cache, index=index, policy=QUICK, cache_gb=4 * size_of_first(index) / GB)
    order = LaneOrder(index, 2, 8, 0)
    found = []
    for batch in LaneStream(index, order, reader, rank=rank, world=world, workers=workers, stop_step=12, chunk=4):
        numbers = [int(key[1:]) for key in batch.keys]
        assert not batch.bad and (batch.tiles.numpy() == TILES[numbers]).all()
        found.append(batch.keys)
    return found


def size_of_first(index: ShardIndex) -> int:
    return index.shards[0].bytes


def test_the_shards_used_longest_ago_make_room(served: tuple[str, type[FaultyHandler]], tmp_path: Path) -> None:
    url, handler = served
    index = open_index(url, tmp_path, QUICK)
    size = size_of_first(index)
    reader = ShardReader(url, tmp_path, index=index, policy=QUICK, cache_gb=3 * size / GB, open_files=1)
    for number in (0, 1, 2, 0, 3):  # opened again, 0 is newer than 1
        reader.read(f"shard-{number:06d}.tar", 512, 10)
        time.sleep(0.01)
    assert cached(tmp_path) == ["shard-000000.tar", "shard-000002.tar", "shard-000003.tar"]
    assert handler.requests.count("shard-000000.tar") == 1
    assert not list(tmp_path.rglob(".*"))  # neither locks nor parts stay


def test_a_removed_shard_is_readable_until_it_is_closed_and_is_closed_soon(
    served: tuple[str, type[FaultyHandler]], tmp_path: Path
) -> None:
    url, _ = served
    index = open_index(url, tmp_path, QUICK)
    one = ShardReader(url, tmp_path, index=index, policy=QUICK, cache_gb=size_of_first(index) / GB)
    other = ShardReader(url, tmp_path, index=index, policy=QUICK, cache_gb=size_of_first(index) / GB)
    expected = one.read("shard-000000.tar", 0, 2000)
    other.read("shard-000001.tar", 0, 1)
    assert cached(tmp_path) == ["shard-000001.tar"]
    assert one.read("shard-000000.tar", 0, 2000) == expected
    one.read("shard-000002.tar", 0, 1)
    assert list(one._files) == ["shard-000002.tar"]


def test_a_cap_below_one_shard_is_refused(served: tuple[str, type[FaultyHandler]], tmp_path: Path) -> None:
    reader = ShardReader(served[0], tmp_path, policy=QUICK, cache_gb=1e-6)
    with pytest.raises(InputError, match="data.cache_gb is 1e-06: shard-000000.tar alone has"):
        reader.read("shard-000000.tar", 0, 1)


def test_a_damaged_cached_shard_is_fetched_again(
    served: tuple[str, type[FaultyHandler]], shards: Path, tmp_path: Path
) -> None:
    url, _ = served
    ShardReader(url, tmp_path, policy=QUICK).read("shard-000000.tar", 0, 1)
    (path,) = tmp_path.rglob("shard-000000.tar")
    os.truncate(path, 700)
    ShardReader(url, tmp_path, policy=QUICK).read("shard-000000.tar", 600, 200)
    assert path.read_bytes() == (shards / path.name).read_bytes()


def test_a_cut_index_does_not_stay_in_the_cache(served: tuple[str, type[FaultyHandler]], tmp_path: Path) -> None:
    url, handler = served
    handler.fault = staticmethod(in_turn({"index.arrow": ["short"]}))  # its size is known from nowhere
    with pytest.raises(InputError, match="damaged index"):
        open_index(url, tmp_path, QUICK)
    assert len(open_index(url, tmp_path, QUICK)) == 80


def test_processes_and_workers_share_a_small_cache_of_a_faulty_store(shards: Path, tmp_path: Path) -> None:
    """Two ranks with two workers each, a cap of four shards of eight, and every fault that a server can have."""
    kinds = ["error", "cut", "short", "stall", "flip"]
    with (
        http_store(shards, fault=by_chance(3, kinds, most=1), patience=0.5) as (url, handler),
        ProcessPoolExecutor(2, mp_context=CONTEXT) as pool,
    ):
        jobs = [pool.submit(keys, url, tmp_path, workers=2, rank=rank, world=2) for rank in range(2)]
        ranks = [job.result(timeout=300) for job in jobs]
    whole = keys(shards, tmp_path)
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]
    assert len(cached(tmp_path)) <= 4 and len(handler.requests) > 12
    assert not list(tmp_path.rglob("*.part"))


KILLED = """
import sys
from ca2cl.data.remote.reader import ShardReader
reader = ShardReader(sys.argv[1], sys.argv[2], cache_gb=1)
sys.stdout.write("ready\\n"); sys.stdout.flush()
reader.read("shard-000000.tar", 0, 1)
"""


def test_a_kill_in_the_middle_of_a_transfer_leaves_nothing_that_is_served(shards: Path, tmp_path: Path) -> None:
    with http_store(shards, fault=in_turn({"shard-000000.tar": ["stall"]}), patience=60) as (url, _):
        command = [sys.executable, "-c", KILLED, url, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while not list(tmp_path.rglob("*.part")) and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        left = [path.name for path in tmp_path.rglob(".*") if path.is_file()]
        assert any(name.endswith(".part") for name in left) and ".shard-000000.tar.lock" in left
        assert cached(tmp_path) == [name for name in sorted(left) if "shard" in name]
        # another shard's fetch clears up, too, where room is reckoned
        reader = ShardReader(url, tmp_path, policy=QUICK, cache_gb=1)
        reader.read("shard-000001.tar", 0, 1)
        assert cached(tmp_path) == ["shard-000001.tar"]
        data = reader.read("shard-000000.tar", 0, size_of(shards))
    assert data == (shards / "shard-000000.tar").read_bytes()


FULL = """
import os, sys
from pathlib import Path
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.data.remote.reader import ShardReader
from ca2cl.errors import InputError
url, cache = sys.argv[1:]
reader = ShardReader(url, cache, policy=FetchPolicy(attempts=2, timeout=5, pause=0.01))
for number in range(8):  # room for about four
    reader.read(f"shard-{number:06d}.tar", 0, 1)
kept = sorted(path.name for path in Path(cache).glob("*/shards/*"))
assert "shard-000007.tar" in kept and "shard-000000.tar" not in kept, kept
sizes = {path.stat().st_size for path in Path(cache).glob("*/shards/*")}
assert len(sizes) == 1, sizes
reader.close()
for path in Path(cache).glob("*/shards/*"):
    path.unlink()
with open(f"{cache}/other", "wb") as other:
    try:
        while os.write(other.fileno(), bytes(4096)):
            pass
    except OSError:
        pass
try:
    reader.read("shard-000000.tar", 0, 1)
except InputError as error:
    assert "no room for shard-000000.tar; free some" in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("a full disk went unnoticed")
assert not list(Path(cache).glob("*/shards/*tar*")), list(Path(cache).glob("*/shards/*"))
"""


def test_a_full_disk_costs_other_shards_and_then_is_one_line(
    served: tuple[str, type[FaultyHandler]], shards: Path, tmp_path: Path
) -> None:
    mount = f"mount -t tmpfs -o size={size_of(shards) * 5 // 1024}k tmpfs {tmp_path}"
    namespace = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*namespace, "sh", "-c", mount], check=False, capture_output=True).returncode:
        pytest.skip("needs a user that may mount a file system of its own")
    script = f'{mount} && exec "$@"'
    command = [*namespace, "sh", "-c", script, "sh", sys.executable, "-c", FULL, served[0], str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "other shards removed from the cache" in done.stderr


@pytest.mark.parametrize(("scheme", "store"), [("s3", s3_store), ("gs", gs_store)])
def test_a_store_equals_the_local_folder_and_its_faults_are_told(
    shards: Path,
    tmp_path: Path,
    scheme: str,
    store: Callable[[], AbstractContextManager[dict[str, str]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with store():
        url = upload(shards, f"{scheme}://tiles/set")
        assert keys(url, tmp_path / "a", workers=2) == keys(shards, tmp_path)
        index = open_index(url, tmp_path / "b", QUICK)
        with pytest.raises(InputError, match=f"{scheme}://tiles/none/manifest.json: not found"):
            open_index(f"{scheme}://tiles/none", tmp_path / "b", QUICK)
        with pytest.raises(InputError, match="not found"):
            open_index(f"{scheme}://nobucket/set", tmp_path / "b", QUICK)
        assert "attempt" not in caplog.text  # what is not there is not asked for again
    with pytest.raises(InputError, match="shard-000000.tar: (cannot be fetched after 5 attempts|may not be read)"):
        ShardReader(url, index=index, policy=replace(QUICK, timeout=2.0)).read("shard-000000.tar", 0, 1)


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['s3fs'] = None; sys.modules['gcsfs'] = None\n"
        "from ca2cl.data.remote.reader import open_index\n"
        "from ca2cl.errors import InputError\n"
        "for url, extra in (('s3://b/x', 's3'), ('gs://b/x', 'gcs')):\n"
        "    try:\n"
        "        open_index(url, sys.argv[1])\n"
        "    except InputError as error:\n"
        "        assert f'pip install \"ca2cl[{extra}]\"' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(url)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
