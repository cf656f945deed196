"""Samples' bytes, locally and through fsspec, and what broken stores get."""

from __future__ import annotations

import functools
import http.server
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ca2cl.data.index import INDEX_NAME, MANIFEST_NAME, ShardIndex
from ca2cl.data.storage import FetchPolicy, ShardReader, open_index
from ca2cl.errors import InputError
from tests.shards import encode, random_tiles, write_shards

QUICK = FetchPolicy(attempts=3, timeout=0.5, pause=0.01)


@pytest.fixture
def encoded() -> list[bytes]:
    return [encode(tile) for tile in random_tiles(25)]


@pytest.fixture
def shards(tmp_path: Path, encoded: list[bytes]) -> Path:
    return write_shards(tmp_path / "shards", encoded)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; ``faults`` maps a file's name to faults still to come, one a request."""

    faults: dict[str, list[str]] = {}
    requests: list[str] = []

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.requests.append(name)
        fault = self.faults[name].pop(0) if self.faults.get(name) else ""
        if fault == "error":
            self.send_error(503)
        elif fault == "hang":
            time.sleep(2)
        elif fault in ("cut", "flip"):
            data = bytearray((Path(self.directory) / name).read_bytes())
            data[600] ^= 1
            self.send_response(200)
            body = bytes(data if fault == "flip" else data[: len(data) // 2])
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(shards: Path) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Fresh", (Handler,), {"faults": {}, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(shards)))
    thread = threading.Thread(target=functools.partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def read_all(reader: ShardReader, index: ShardIndex) -> list[bytes]:
    found = []
    for info, samples in zip(index.shards, index, strict=True):
        found += [reader.read(info.name, int(o), int(n)) for o, n in zip(samples.offset, samples.size, strict=True)]
    return found


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_local_bytes_equal_what_was_written(shards: Path, encoded: list[bytes]) -> None:
    for open_files in (1, 2, 100):
        assert read_all(ShardReader(shards, open_files=open_files), ShardIndex(shards)) == encoded


def test_open_descriptors_are_bounded_and_closed(shards: Path) -> None:
    index = ShardIndex(shards)
    reader = ShardReader(shards, index=index, open_files=2)
    before = descriptors()
    read_all(reader, index)
    assert descriptors() == before + 2
    reader.close()
    assert descriptors() == before
    read_all(reader, index)
    del reader
    assert descriptors() == before


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
    served: tuple[str, type[Handler]], tmp_path: Path, encoded: list[bytes]
) -> None:
    url, handler = served
    for _ in range(2):
        index = open_index(url, tmp_path / "cache", QUICK)
        assert read_all(ShardReader(url, index=index, policy=QUICK), index) == encoded
    names = [f"shard-{i:06d}.tar" for i in range(3)]
    assert sorted(n for n in handler.requests if n != MANIFEST_NAME) == sorted([INDEX_NAME, *names])
    left = [p.name for p in tmp_path.rglob("*.part")] + [p.name for p in (tmp_path / "cache").glob(".manifest*")]
    assert not left


@pytest.mark.parametrize("fault", ["error", "hang", "cut", "flip"])
def test_a_failing_transfer_is_tried_again(
    served: tuple[str, type[Handler]], tmp_path: Path, encoded: list[bytes], fault: str
) -> None:
    url, handler = served
    handler.faults["shard-000001.tar"] = [fault, fault]
    index = open_index(url, tmp_path, QUICK)
    assert read_all(ShardReader(url, index=index, policy=QUICK), index) == encoded
    assert handler.requests.count("shard-000001.tar") == 3


def test_a_store_that_keeps_failing_is_one_clear_line(served: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = served
    handler.faults["shard-000001.tar"] = ["cut"] * 9
    reader = ShardReader(url, tmp_path / "cache", policy=QUICK)
    with pytest.raises(InputError, match="shard-000001.tar: cannot be fetched after 3 attempts.*the index says") as got:
        reader.read("shard-000001.tar", 0, 1)
    assert "\n" not in str(got.value)
    assert not list((tmp_path / "cache").rglob("shard-000001.tar"))


def test_unreachable_and_missing_stores_are_clear(tmp_path: Path, served: tuple[str, type[Handler]]) -> None:
    with pytest.raises(InputError, match="cannot be fetched after 3 attempts"):
        open_index("http://127.0.0.1:9/none", tmp_path, QUICK)
    with pytest.raises(InputError, match="not found"):
        open_index(served[0] + "/elsewhere", tmp_path, QUICK)
    with pytest.raises(InputError, match="--data.cache_dir"):
        open_index(served[0], None)
    with pytest.raises(InputError, match="nosuchscheme"):
        open_index("nosuchscheme://bucket/x", tmp_path, QUICK)


def test_data_written_again_under_the_same_url_is_not_read_from_the_old_cache(
    served: tuple[str, type[Handler]], shards: Path, tmp_path: Path
) -> None:
    read_all(ShardReader(served[0], tmp_path / "c", policy=QUICK), open_index(served[0], tmp_path / "c", QUICK))
    new = [encode(tile) for tile in random_tiles(25, seed=1)]
    write_shards(shards, new)
    index = open_index(served[0], tmp_path / "c", QUICK)
    assert read_all(ShardReader(served[0], index=index, policy=QUICK), index) == new
