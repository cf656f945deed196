"""Names in an index, a tar, an archive or a list stay in their folder, and a URL reaches no shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from ca2cl.common.records import is_file_name, lies_in
from ca2cl.data.loading.stream import SampleSource, UndecodableError
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import (
    INDEX_NAME,
    MANIFEST_NAME,
    Manifest,
    ShardIndex,
    digest_of,
    write_index,
)
from ca2cl.data.shards.samples import ShardInfo, ShardSamples
from ca2cl.data.sources.choose import open_source
from ca2cl.detection.coco.files import read_coco
from ca2cl.errors import InputError
from ca2cl.evaluation.embed.parts import Parts
from ca2cl.reproduce.unpack import unpack
from ca2cl.store.open import open_store
from ca2cl.tracking.journal import Journal
from ca2cl.tracking.replay import Replayer
from ca2cl.tracking.run import read_run
from ca2cl.training.checkpoint import Checkpointer
from tests.support.archives import zipped
from tests.support.jobs import ROOT
from tests.support.shards import encode, random_tiles

OUTSIDE = ("../x", "a/../../x", "/etc/passwd", "..", "", "a\0b", ".", "/")


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_that_leaves_its_folder_is_no_file_name(name: str) -> None:
    assert not is_file_name(name)


def test_names_that_stay_are(tmp_path: Path) -> None:
    assert all(map(is_file_name, ("a.png", "a/b c.png", "..a", "a..b", "ä", "a\\b", "~", "./a")))
    assert not any(map(is_file_name, (None, 1, ["a"], "\ud800")))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "link").symlink_to(tmp_path)
    assert lies_in(tmp_path / "in", tmp_path / "in" / "a") and not lies_in(
        tmp_path / "in", tmp_path / "in" / "link" / "a"
    )


def _shard(root: Path, name: str, members: list[tarfile.TarInfo], data: bytes) -> Path:
    """A shard of these members, each with ``data`` where it is a file, and an index of all of them."""
    root.mkdir()
    with tarfile.open(root / "shard-0.tar", "w") as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    content = (root / "shard-0.tar").read_bytes()
    with tarfile.open(root / "shard-0.tar") as tar:
        places = [(one.offset_data, one.size) for one in tar.getmembers()]
    info = ShardInfo(name, len(content), "0" * 64, len(members))
    count = len(members)
    keys = [member.name for member in members]
    offset, size = (np.array(column, np.int64) for column in zip(*places, strict=True))
    samples = ShardSamples(keys, ["png"] * count, offset, size, np.zeros(count, np.int32), [None] * count)
    write_index(root / INDEX_NAME, [(info, samples)])
    manifest = Manifest(1, ["a"], {"a": count}, [16, 16], "x", "keep", count, 1, len(content), "")
    manifest = Manifest(**{**asdict(manifest), "digest": digest_of(["a"], [16, 16], [info])})
    (root / MANIFEST_NAME).write_text(json.dumps(asdict(manifest)))
    return root


@pytest.mark.parametrize("name", [*OUTSIDE, "a/b.tar", "../shard-0.tar", "shard-0.tar\0", "shard-0.tar/", ".x.tar"])
def test_a_shard_of_another_folder_is_refused(name: str, tmp_path: Path) -> None:
    _shard(tmp_path / "s", name, [tarfile.TarInfo("a.png")], b"x")
    with pytest.raises(InputError, match="is no tar in this folder"):
        ShardIndex(tmp_path / "s")


def test_members_of_a_tar_are_read_and_never_unpacked(tmp_path: Path) -> None:
    """Whatever they are called: a key is a word and no path."""
    link = tarfile.TarInfo("link.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    names = ["../../evil.png", "/tmp/evil-by-ca2cl.png", "a/../b.png"]
    tile = encode(random_tiles(1)[0])
    root = _shard(tmp_path / "s", "shard-0.tar", [*map(tarfile.TarInfo, names), link], tile)
    before = sorted(tmp_path.rglob("*"))
    index = ShardIndex(root)
    source = SampleSource(index, ShardReader(root, index=index))
    out_HWC = np.zeros((16, 16, 3), np.uint8)
    for number, name in enumerate(names):
        assert source.fill(number, out_HWC)[0] == name and (out_HWC == random_tiles(1)[0]).all()
    with pytest.raises(UndecodableError):  # the link has no bytes, and is not followed
        source.fill(3, out_HWC)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/evil-by-ca2cl.png").exists()


def test_a_tar_that_is_a_link_to_something_else_is_seen(tmp_path: Path) -> None:
    root = _shard(tmp_path / "s", "shard-0.tar", [tarfile.TarInfo("a.png")], b"x")
    (root / "shard-0.tar").unlink()
    (root / "shard-0.tar").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="truncated tar|does not match its index"):
        ShardIndex(root)


@pytest.mark.parametrize("name", ["SET/../../evil", "SET//../../evil", "/evil", "SET/\0/../evil", "SET/./../../evil"])
def test_an_archive_writes_only_into_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "SET.zip").write_bytes(zipped({"SET/a.tif": b"1", name: b"2"}))
    try:
        unpack(tmp_path / "in" / "SET.zip", tmp_path / "in" / "SET")
    except InputError as error:
        assert "leaves the folder" in str(error)
    else:
        assert "\0" in name  # zip cuts a name there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"] and not Path("/evil").exists()


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_image_of_another_folder_is_refused(name: str, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": name, "height": 8, "width": 8}
    categories = [{"id": 1, "name": "gland"}]
    (tmp_path / "a.json").write_text(json.dumps({"images": [image], "annotations": [], "categories": categories}))
    with pytest.raises(InputError, match="is no path in the images' folder"):
        read_coco(tmp_path / "a.json")


@pytest.mark.parametrize("name", [*OUTSIDE, "../other/step-000000001", "step-1/../../x"])
def test_a_pointer_to_a_checkpoint_elsewhere_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text(name)
    with pytest.raises(InputError, match="is no checkpoint's name"):
        Checkpointer(tmp_path / "checkpoints", 1).latest()


def test_parts_that_are_links_are_removed_and_not_what_they_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "keep").write_text("x")
    folder = tmp_path / "out.parts"
    folder.mkdir()
    (folder / "part-000000.parquet").symlink_to(tmp_path / "mine" / "keep")
    (folder / "sub").symlink_to(tmp_path / "mine")
    (folder / "job.json").write_text("{}")
    parts = Parts(folder, {"encoder": "x"}, tiles=3, size=3, dim=2)
    parts.claim(overwrite=True)
    assert parts.finished() == {}
    parts.remove()
    assert not folder.exists() and (tmp_path / "mine" / "keep").read_text() == "x"


def test_a_journal_from_elsewhere_sends_nothing_from_elsewhere(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = open_store("", tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds
    run_id = str(store.client.create_run(store.experiment_id("tests")).info.run_id)
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "run"
    (folder / "sub").mkdir(parents=True)
    (folder / "own.txt").write_text("x")
    (folder / "link").symlink_to(tmp_path / "secret")
    journal = Journal(folder / "journal.jsonl")
    for name in ("../secret", str(tmp_path / "secret"), "link", "sub/../../secret"):
        journal.append({"event": "artifact", "path": name, "to": ""})
    journal.append({"event": "artifact", "path": "own.txt", "to": "../../up"})
    journal.append({"event": "encoder", "path": "..", "register_as": None})
    journal.append({"event": "artifact", "path": "own.txt", "to": "good"})
    journal.close()
    assert Replayer(folder, store, run_id).send() == 7
    assert [file.path for file in store.client.list_artifacts(run_id)] == ["good"]


@pytest.mark.parametrize("run_id", ["../x", "a/b", "", "x" * 100, "a?b", None])
def test_a_run_id_that_is_a_path_is_refused(run_id: Any, tmp_path: Path) -> None:
    record = {"run_id": run_id, "tracking_uri": "x", "experiment": "e", "created": 1.0, "params": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"(run_id|run_key\]) is .*restore it"):
        read_run(tmp_path)


def test_a_dataset_reads_only_its_own_files(tmp_path: Path) -> None:
    import datasets

    (tmp_path / "secret.png").write_bytes(encode(random_tiles(1)[0]))
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": None, "path": "a\0b"}]
    table = datasets.Dataset.from_dict({"image": rows})
    table.cast(datasets.Features({"image": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}}))
    table.save_to_disk(str(tmp_path / "set"))
    source = open_source(str(tmp_path / "set"))
    for tile, message in zip(source.tiles([0, 1]), ("lies outside the dataset", "cannot be read"), strict=True):
        with pytest.raises(InputError, match=message):
            source.reader.read(tile)
    state = json.loads((tmp_path / "set" / "state.json").read_text())
    (tmp_path / "set" / "data-00000-of-00001.arrow").rename(tmp_path / "x.arrow")
    state["_data_files"] = [{"filename": "../x.arrow"}]
    (tmp_path / "set" / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match="is no file of its folder"):
        open_source(str(tmp_path / "set"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """An address under which there is nothing."""
    (tmp_path / "served").mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "served")))
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


# In a process of its own: a hook that sees every program that Python starts cannot be taken off again.
_WATCHED = """
import json, sys
seen = []
kinds = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn")
sys.addaudithook(lambda event, args: seen.append(repr((event, args))) if event in kinds else None)
from ca2cl.cli import main
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
import subprocess
subprocess.run(["true", "watched"])
sys.stdout.write(json.dumps([codes, seen]))
"""


def test_a_url_reaches_no_shell(server: str, tmp_path: Path) -> None:
    touch = "touch ran"
    (tmp_path / "file").write_text(touch)
    urls = [
        f"pipe:{touch}", f"pipe://{touch}", f"pipe:curl {server}; {touch}", f"| {touch}", f"; {touch} #", f"$({touch})",
        f"`{touch}`", f"{server}/; {touch}", f"{server}/`{touch}`", f"{server}/$({touch})", f"file:///; {touch}",
        f"file://{tmp_path}/../`{touch}`", f"file://{tmp_path}/file", f"simplecache::pipe:{touch}", f"-x;{touch}",
    ]  # fmt: skip
    verbs = [
        arguments
        for url in urls
        for arguments in (
            ["pretrain", f"--data.shards={url}", "--data.cache_dir=cache", "--run.output_dir=out", "--run.steps=1"],
            ["embed", "--encoder=random", f"--source={url}", "--out=a.parquet", "--cache_dir=cache"],
        )
    ]
    verbs += [["shard", f"--source=hf:{url}", "--out=out"] for url in urls[:3]]
    verbs += [["export", f"--encoder={url}", "--to=torchvision", "--out=a.pth"] for url in urls]
    verbs += [["sync", f"--run_dir={url}"] for url in urls[:7]]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WATCHED, json.dumps(verbs)],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    codes, seen = json.loads(done.stdout.splitlines()[-1])
    assert set(codes) == {2}, done.stderr
    assert seen and "watched" in seen[-1]  # the hook works
    assert not [event for event in seen if "touch" in event or "sh'" in event or "os.system" in event], seen
    assert not list(tmp_path.rglob("ran*")) and done.stderr.count("ca2cl: error") == len(verbs)
