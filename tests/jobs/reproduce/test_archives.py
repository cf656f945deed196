"""Archives: a record read, files brought here over a network that fails in every way, and unpacked safely."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ca2cl.data.transfer.download import FetchPolicy
from ca2cl.errors import InputError
from ca2cl.reproduce import archives as module
from ca2cl.reproduce.archives import Archive, check_space, choose, download, part_of, read_record
from ca2cl.reproduce.datasets import MD5
from ca2cl.reproduce.unpack import unpack
from tests.support.archives import Zenodo, serving, zipped

CONTENT = np.random.default_rng(0).bytes(3_000_000)
POLICY = FetchPolicy(attempts=3, timeout=30, pause=0.01)


@pytest.fixture
def zenodo() -> Iterator[Zenodo]:
    with serving({"a.zip": CONTENT}) as server:
        yield server


def fetched(zenodo: Zenodo, folder: Path) -> bytes:
    archive = read_record(zenodo.record_url, POLICY)["a.zip"]
    download(archive, folder / "a.zip", POLICY)
    assert not part_of(folder / "a.zip").exists()
    return (folder / "a.zip").read_bytes()


def test_a_record_says_name_size_md5_and_link(zenodo: Zenodo) -> None:
    (archive,) = read_record(zenodo.record_url, POLICY).values()
    link = f"{zenodo.record_url}/files/a.zip/content"
    assert archive == Archive("a.zip", len(CONTENT), hashlib.md5(CONTENT).hexdigest(), link)


def test_a_file_comes_whole_and_is_not_asked_for_again(zenodo: Zenodo, tmp_path: Path) -> None:
    assert fetched(zenodo, tmp_path) == CONTENT and zenodo.asked == [""]
    assert fetched(zenodo, tmp_path) == CONTENT and zenodo.asked == [""]


def test_it_goes_on_from_a_part_of_a_start_before(zenodo: Zenodo, tmp_path: Path) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT[:1_000_000])
    assert fetched(zenodo, tmp_path) == CONTENT and zenodo.asked == ["bytes=1000000-"]


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_taken_up_where_the_server_can(zenodo: Zenodo, tmp_path: Path, ranges: bool) -> None:
    zenodo.ranges, zenodo.cuts = ranges, [100_000, 300_000, 2_500_000]
    assert fetched(zenodo, tmp_path) == CONTENT
    starts = [int(asked.removeprefix("bytes=").removesuffix("-") or 0) for asked in zenodo.asked]
    # a server without ranges is found out by the second request, and is not asked for one again
    came = [0, 100_000, 400_000, 2_900_000] if ranges else [0, 100_000, 0, 0]
    assert all(0 <= most - start < 4 * 2**16 for start, most in zip(starts, came, strict=True)), starts


def test_a_connection_that_is_cut_ever_earlier_ends_and_keeps_what_came(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.ranges, zenodo.cuts = False, [500_000] * 9
    with pytest.raises(InputError, match=r"a\.zip/content: cannot be fetched after 3 attempts .*; see --record_url"):
        fetched(zenodo, tmp_path)
    came = (tmp_path / "a.zip.part").read_bytes()
    assert 0 < len(came) <= 500_000 and CONTENT.startswith(came) and len(zenodo.asked) == 4


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.busy = [503, 429]
    archive = read_record(zenodo.record_url, POLICY)["a.zip"]
    zenodo.busy = [500, 502]
    download(archive, tmp_path / "a.zip", POLICY)
    assert (tmp_path / "a.zip").read_bytes() == CONTENT
    with pytest.raises(InputError, match="content: not found; .*see --record_url"):
        download(Archive("b.zip", 1, "0" * 32, f"{zenodo.record_url}/files/b.zip/content"), tmp_path / "b.zip", POLICY)
    zenodo.busy = [503] * 3
    with pytest.raises(InputError, match=r"1214456: cannot be fetched after 3 attempts \(503,.*see --record_url"):
        read_record(zenodo.record_url, POLICY)


def test_a_wrong_byte_is_noticed_and_the_next_start_begins_anew(zenodo: Zenodo, tmp_path: Path) -> None:
    zenodo.spoilt = {"a.zip"}
    with pytest.raises(InputError, match=r"/a\.zip/content: its md5 is .*, and not .*; it was deleted, run again"):
        fetched(zenodo, tmp_path)
    assert list(tmp_path.iterdir()) == []
    zenodo.spoilt = set()
    assert fetched(zenodo, tmp_path) == CONTENT


def test_an_archive_that_was_there_is_checked_before_it_is_believed_and_is_left_alone(
    zenodo: Zenodo, tmp_path: Path
) -> None:
    mine = CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])
    (tmp_path / "a.zip").write_bytes(mine)
    with pytest.raises(InputError, match=r"/a\.zip: not the published archive, its MD5 is .* the record says"):
        fetched(zenodo, tmp_path)
    assert (tmp_path / "a.zip").read_bytes() == mine and zenodo.asked == []


@pytest.mark.parametrize("extra", [1, 1_000_000])
def test_a_part_that_is_too_long_is_not_of_this_file(zenodo: Zenodo, tmp_path: Path, extra: int) -> None:
    (tmp_path / "a.zip.part").write_bytes(CONTENT + bytes(extra))
    assert fetched(zenodo, tmp_path) == CONTENT and zenodo.asked == [""]


def test_another_md5_than_the_one_known_is_no_reproduction(zenodo: Zenodo) -> None:
    record = read_record(zenodo.record_url, POLICY)
    assert choose(record, "a.zip", "here", {}) is record["a.zip"]
    with pytest.raises(InputError, match="says that a.zip has MD5 .*it is known to have 0000"):
        choose(record, "a.zip", "here", {"a.zip": "0" * 32})
    with pytest.raises(InputError, match=r"the record has no b\.zip; it has a\.zip"):
        choose(record, "b.zip", "here", {})
    assert all(len(digest) == 32 and int(digest, 16) for digest in MD5.values())


def test_what_is_no_record_is_said_so(zenodo: Zenodo, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (b"[]", b"<html>", b'{"files": [{"key": "a"}]}', b'{"files": [{"key": "a", "checksum": "sha256:00"}]}'):
        monkeypatch.setattr(zenodo, "record", lambda text=text: text)
        with pytest.raises(InputError, match="not a record's JSON with files"):
            read_record(zenodo.record_url, POLICY)


def test_a_disk_that_is_too_small_is_known_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda folder: usage._replace(free=2_500_000_000))
    check_space(tmp_path, 2_500_000_000, "this")
    with pytest.raises(InputError, match=r"this needs 2\.6 GB, 2\.5 GB are free"):
        check_space(tmp_path, 2_600_000_000, "this")


@pytest.mark.parametrize("top", ["SET/", ""])
def test_a_zip_is_unpacked_with_or_without_its_own_folder(tmp_path: Path, top: str) -> None:
    files = {f"{top}ADI/a.tif": b"1", f"{top}TUM/b.tif": b"22", f"__MACOSX/{top}._a": b"x", f"{top}ADI/.DS_Store": b"x"}
    (tmp_path / "SET.zip").write_bytes(zipped(files))
    (tmp_path / ".SET.unpacking").mkdir()  # of a start that was killed
    (tmp_path / ".SET.unpacking" / "old.tif").write_bytes(b"0")
    unpack(tmp_path / "SET.zip", tmp_path / "SET")
    found = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*.tif")}
    assert found == {"SET/ADI/a.tif": b"1", "SET/TUM/b.tif": b"22"}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["SET", "SET.zip"]


@pytest.mark.parametrize("name", ["../evil", "SET/../../evil", "/tmp/evil", "SET\\..\\evil", "C:evil"])
def test_paths_that_leave_the_folder_are_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "SET.zip").write_bytes(zipped({"SET/ADI/a.tif": b"1", name: b"2"}))
    with pytest.raises(InputError, match="a path that leaves the folder"):
        unpack(tmp_path / "SET.zip", tmp_path / "SET")
    assert [entry.name for entry in tmp_path.iterdir()] == ["SET.zip"] and not Path("/tmp/evil").exists()


def test_a_link_and_a_damaged_archive_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("SET/ADI")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "SET.zip", "w") as archive:
        archive.writestr(link, "/etc")
    with pytest.raises(InputError, match="'SET/ADI' is a link"):
        unpack(tmp_path / "SET.zip", tmp_path / "SET")
    whole = zipped({"SET/ADI/a.tif": CONTENT[:5000]})
    for damaged in (whole[:2000], whole[:1000] + bytes(50) + whole[1050:], b"", zipped({})):
        (tmp_path / "SET.zip").write_bytes(damaged)
        with pytest.raises(InputError, match="(damaged|holds no files).*use --download"):
            unpack(tmp_path / "SET.zip", tmp_path / "SET")
        assert [entry.name for entry in tmp_path.iterdir()] == ["SET.zip"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(zenodo: Zenodo, tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(InputError, match="cannot be written"):
        fetched(zenodo, tmp_path)
    tmp_path.chmod(0o755)
