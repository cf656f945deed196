"""Samples' bytes, locally and through fsspec, and what broken stores get."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from ca2cl.data.remote.reader import ShardReader, open_index
from ca2cl.data.shards.index import INDEX_NAME, MANIFEST_NAME, ShardIndex
from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from tests.support.shards import encode, random_tiles, write_shards
from tests.support.stores import FaultyHandler, http_store, in_turn

QUICK = FetchPolicy(attempts=3, timeout=30, pause=0.01)
SILENT = ("hang", "stall")
"""Faults that only a time limit ends."""


@pytest.fixture
def encoded() -> list[bytes]:
    return [encode(tile) for tile in random_tiles(25)]


@pytest.fixture
def shards(tmp_path: Path, encoded: list[bytes]) -> Path:
    return write_shards(tmp_path / "shards", encoded)


@pytest.fixture
def served(shards: Path) -> Iterator[tuple[str, type[FaultyHandler]]]:
    with http_store(shards) as store:
        yield store


def read_all(reader: ShardReader, index: ShardIndex) -> list[bytes]:
    found = []
    for info, samples in zip(index.shards, index, strict=True):
        found += [reader.read(info.name, int(o), int(n)) for o, n in zip(samples.offset, samples.size, strict=True)]
    return found


def descriptors(folder: Path) -> int:
    """How many shards of ``folder`` this process has open; other files come and go with what earlier tests left."""
    found = 0
    for one in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # that of the listing itself is closed by now
            found += one.readlink().suffix == ".tar" and one.readlink().is_relative_to(folder)
    return found


def test_local_bytes_equal_what_was_written(shards: Path, encoded: list[bytes]) -> None:
    for open_files in (1, 2, 100):
        assert read_all(ShardReader(shards, open_files=open_files), ShardIndex(shards)) == encoded


def test_open_descriptors_are_bounded_and_closed(shards: Path) -> None:
    index = ShardIndex(shards)
    reader = ShardReader(shards, index=index, open_files=2)
    assert descriptors(shards) == 0
    read_all(reader, index)
    assert descriptors(shards) == 2
    reader.close()
    assert descriptors(shards) == 0
    read_all(reader, index)
    del reader
    assert descriptors(shards) == 0


def test_a_reader_that_outlives_its_modules_is_freed_in_silence(shards: Path) -> None:
    reader, index = ShardReader(shards), ShardIndex(shards)
    read_all(reader, index)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ca2cl.data.remote.reader.os", None)  # as at the interpreter's end
        reader.__del__()


def test_a_forked_or_unpickled_reader_reads_the_same(shards: Path, encoded: list[bytes]) -> None:
    reader, index = ShardReader(shards), ShardIndex(shards)
    assert read_all(reader, index) == encoded
    assert read_all(pickle.loads(pickle.dumps(reader)), index) == encoded  # noqa: S301 - our own bytes
    child = os.fork()
    if child == 0:
        os._exit(0 if read_all(reader, index) == encoded else 1)
    assert read_all(reader, index) == encoded
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_truncated_shard_names_file_and_remedy(shards: Path) -> None:
    tar = shards / "shard-000001.tar"
    size = tar.stat().st_size
    reader = ShardReader(shards)
    os.truncate(tar, size // 2)
    with pytest.raises(InputError, match=rf"shard-000001.tar: {size // 2} bytes, the index says {size}.*copy it again"):
        reader.read(tar.name, 512, 10)


def test_shard_truncated_while_open_is_noticed(shards: Path) -> None:
    reader = ShardReader(shards)
    reader.read("shard-000001.tar", 512, 10)
    os.truncate(shards / "shard-000001.tar", 515)
    with pytest.raises(InputError, match="ends at byte 515.*truncated"):
        reader.read("shard-000001.tar", 512, 10)


def test_missing_shard_is_named(shards: Path) -> None:
    reader = ShardReader(shards)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(InputError, match="shard-000002.tar: cannot be read .No such file"):
        reader.read("shard-000002.tar", 0, 1)


def test_remote_is_fetched_once_and_equals_local(
    served: tuple[str, type[FaultyHandler]], tmp_path: Path, encoded: list[bytes]
) -> None:
    url, handler = served
    for _ in range(2):
        index = open_index(url, tmp_path / "cache", QUICK)
        assert read_all(ShardReader(url, index=index, policy=QUICK), index) == encoded
    names = [f"shard-{i:06d}.tar" for i in range(3)]
    assert sorted(n for n in handler.requests if n != MANIFEST_NAME) == sorted([INDEX_NAME, *names])
    left = [p.name for p in tmp_path.rglob("*.part")] + [p.name for p in (tmp_path / "cache").glob(".manifest*")]
    assert not left


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("fault", ["error", "later", "hang", "cut", "short", "stall", "flip"])
def test_a_failing_transfer_is_tried_again(
    served: tuple[str, type[FaultyHandler]], tmp_path: Path, encoded: list[bytes], fault: str, ranges: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url, handler = served
    if fault == "later":  # its second is waited for below, by another test
        monkeypatch.setattr("ca2cl.data.transfer.download.time.sleep", lambda _: None)
    handler.ranges = ranges
    handler.fault = staticmethod(in_turn({"shard-000001.tar": [fault, fault]}))
    policy = replace(QUICK, timeout=1.0) if fault in SILENT else QUICK
    index = open_index(url, tmp_path, QUICK)
    assert read_all(ShardReader(url, index=index, policy=policy), index) == encoded
    # without ranges a part is of no use: the second request finds that out and the third begins again
    assert handler.requests.count("shard-000001.tar") == 3
    assert not list(tmp_path.rglob(".*"))


def test_a_transfer_that_broke_off_goes_on_where_it_stopped(
    tmp_path: Path, served: tuple[str, type[FaultyHandler]]
) -> None:
    url, handler = served
    handler.fault = staticmethod(in_turn({"shard-000000.tar": ["cut", "error", "hang"]}))
    reader = ShardReader(url, tmp_path, policy=FetchPolicy(attempts=4, timeout=1.0, pause=0.01))
    reader.read("shard-000000.tar", 0, 1)
    starts = [start for name, start in handler.starts if name == "shard-000000.tar"]
    assert len(starts) == 2 and 0 == starts[0] < starts[1], starts


def test_a_server_that_asks_to_be_left_alone_is(
    tmp_path: Path, served: tuple[str, type[FaultyHandler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, handler = served
    handler.fault = staticmethod(in_turn({"shard-000000.tar": ["later"]}))
    reader = ShardReader(url, tmp_path, policy=FetchPolicy(timeout=30, pause=0.01))
    pauses: list[float] = []
    monkeypatch.setattr("ca2cl.data.transfer.download.time.sleep", pauses.append)
    reader.read("shard-000000.tar", 0, 1)
    assert pauses == [1.0]  # what it asked for, and not the policy's 0.01


def test_a_store_that_keeps_failing_is_one_clear_line(served: tuple[str, type[FaultyHandler]], tmp_path: Path) -> None:
    url, handler = served
    handler.fault = staticmethod(in_turn({"shard-000001.tar": ["short"] * 99}))
    handler.ranges = False
    reader = ShardReader(url, tmp_path / "cache", policy=QUICK)
    with pytest.raises(InputError, match="shard-000001.tar: cannot be fetched after 3 attempts.*are expected") as got:
        reader.read("shard-000001.tar", 0, 1)
    assert "\n" not in str(got.value) and handler.requests.count("shard-000001.tar") == 4
    assert not list((tmp_path / "cache").rglob("*shard-000001.tar*"))


def test_access_denied_is_not_tried_again_and_secrets_are_not_shown(
    served: tuple[str, type[FaultyHandler]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url, handler = served
    handler.fault = staticmethod(in_turn({"shard-000001.tar": ["error", "denied"]}))
    reader = ShardReader(f"{url.replace('//', '//user:word@')}/?sig=token", tmp_path, policy=QUICK)
    with pytest.raises(InputError, match="shard-000001.tar: may not be read .403.*credentials") as got:
        reader.read("shard-000001.tar", 0, 1)
    assert handler.requests.count("shard-000001.tar") == 2
    for text in (str(got.value), caplog.text):
        assert "shard-000001.tar" in text and "token" not in text and "word" not in text and "sig" not in text


def test_unreachable_and_missing_stores_are_clear(tmp_path: Path, served: tuple[str, type[FaultyHandler]]) -> None:
    with pytest.raises(InputError, match="cannot be fetched after 3 attempts"):
        open_index("http://127.0.0.1:9/none", tmp_path, QUICK)
    with pytest.raises(InputError, match="not found"):
        open_index(served[0] + "/elsewhere", tmp_path, QUICK)
    with pytest.raises(InputError, match="--data.cache_dir"):
        open_index(served[0], None)
    with pytest.raises(InputError, match="nosuchscheme"):
        open_index("nosuchscheme://bucket/x", tmp_path, QUICK)


def test_data_written_again_under_the_same_url_is_not_read_from_the_old_cache(
    served: tuple[str, type[FaultyHandler]], shards: Path, tmp_path: Path
) -> None:
    read_all(ShardReader(served[0], tmp_path / "c", policy=QUICK), open_index(served[0], tmp_path / "c", QUICK))
    new = [encode(tile) for tile in random_tiles(25, seed=1)]
    write_shards(shards, new)
    index = open_index(served[0], tmp_path / "c", QUICK)
    assert read_all(ShardReader(served[0], index=index, policy=QUICK), index) == new
