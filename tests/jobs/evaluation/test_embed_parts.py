"""``ca2cl embed`` in parts: several processes, kills, parts of other jobs."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ca2cl.data.loading.workers import TileWorkers
from ca2cl.errors import InputError
from ca2cl.evaluation.embed import run as embed_module
from ca2cl.evaluation.embed import writer as embed_files
from ca2cl.evaluation.embed.parts import Parts, mine
from ca2cl.evaluation.embed.run import run
from tests.support.embedding import (
    PART,
    SIZE,
    TILES,
    Stop,
    config,
    damage,
    files,
    interrupt,
    make_tissue,
)
from tests.support.forked import Forked, ca2cl, start_ranks


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, shards of them, and an encoder's folder."""
    return make_tissue(tmp_path_factory.mktemp("embed"))


@pytest.fixture(scope="module")
def embedded(tissue: Path) -> Path:
    """The Parquet file of the shards, made in one process and one go."""
    assert run(config(tissue, tissue / "whole.parquet")) == 0
    return tissue / "whole.parquet"


def two_started(arguments: list[str], folder: Path) -> list[tuple[int | None, list[str]]]:
    """Exit code and error lines of the verb's two processes, each as it ends by itself, without a launcher that would
    end the one for the other."""
    processes = start_ranks(folder, "embed", *arguments, processes=2)
    texts = [process.communicate(timeout=240)[1] for process in processes]
    errors = [[line for line in text.splitlines() if line.startswith("ca2cl: error")] for text in texts]
    return [(process.returncode, lines) for process, lines in zip(processes, errors, strict=True)]


def launch_two(tissue: Path, out: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    settings = ["--batch_size", "4", "--part_size", str(PART), "--workers", "0", "--encoder", str(tissue / "encoder")]
    return ca2cl(folder, "embed", *settings, str(tissue / "shards"), str(out), processes=2)


def test_two_processes_go_on_from_one_and_write_the_same_file(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "two.parquet"
    parts = interrupt(monkeypatch, config(tissue, out), after=1)
    assert files(parts) == ["job.json", "lock", "part-000000.parquet"]
    finished = launch_two(tissue, out, tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert f"1 of {-(-TILES // PART)} parts are finished" in finished.stderr
    assert f"{TILES} vectors of 512 numbers" in finished.stdout
    assert out.read_bytes() == embedded.read_bytes()
    assert files(tmp_path) == ["two.parquet"]


def test_what_rank_0_refuses_ends_both_with_one_line(tissue: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "there.parquet"
    out.parent.mkdir()
    out.write_bytes(b"mine")
    encoder = ["--encoder", str(tissue / "encoder"), "--workers", "0"]
    (code, (line,)), silent = two_started([*encoder, str(tissue / "shards"), str(out)], tmp_path)
    assert (code, silent) == (2, (2, [])) and "there.parquet: exists" in line
    assert files(out.parent) == ["there.parquet"] and out.read_bytes() == b"mine"


def test_what_only_rank_1_meets_is_told_by_it_and_ends_both(tissue: Path, tmp_path: Path) -> None:
    source, (key, _) = damage(tissue, tmp_path / "shards", (34, 35))
    arguments = ["--encoder", str(tissue / "encoder"), "--workers", "0", "--part_size", str(PART), source]
    (code, (waiting,)), (other, (line,)) = two_started([*arguments, str(tmp_path / "v.parquet")], tmp_path)
    assert (code, other) == (2, 2) and not (tmp_path / "v.parquet").exists()
    assert line.startswith("ca2cl: error (rank 1): max_bad_rate is 0.01: at least 2 of 36") and key in line
    assert "another process of this job ended early" in waiting


def test_a_killed_job_goes_on_from_its_finished_parts(
    tissue: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, parts = tmp_path / "k.parquet", tmp_path / "k.parquet.parts"
    many = {"part_size": 2, "batch_size": 1, "image_size": 128}
    settings = ["--workers", "1", *(part for name in many for part in (f"--{name}", str(many[name])))]
    encoder = str(tissue / "encoder")
    process = Forked(tmp_path, "embed", "--encoder", encoder, str(tissue / "shards"), str(out), *settings)
    patience = time.monotonic() + 240
    while len(list(parts.glob("part-*.parquet"))) < 2 and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not out.exists()
    left = len(list(parts.glob("part-*.parquet")))
    assert 2 <= left < TILES // 2
    with caplog.at_level(logging.INFO):
        assert run(config(tissue, out, **many)) == 0
    assert f"{left} of {TILES // 2} parts are finished" in caplog.text
    assert run(config(tissue, tmp_path / "whole.parquet", **many)) == 0
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert not parts.exists()


def test_finished_parts_are_taken_and_not_made_again(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    parts = interrupt(monkeypatch, settings, after=3)
    (parts / "part-000001.parquet").write_bytes(b"torn")
    asked = []
    answers = TileWorkers.answers

    def record(self: Any, requests: Any) -> Any:
        asked.extend(requests)
        return answers(self, requests)

    monkeypatch.setattr(TileWorkers, "answers", record)
    assert run(settings) == 0
    assert asked == [(10, 14), (14, 18), (18, 20), (30, 34), (34, 36)]
    assert (tmp_path / "v.parquet").read_bytes() == embedded.read_bytes()


def test_killed_while_it_put_its_parts_away_it_is_complete(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "remove", lambda self: self.path(0).unlink())
        run(settings)
    before = (tmp_path / "v.parquet").stat().st_mtime_ns
    assert run(settings) == 0
    assert "already complete" in capsys.readouterr().out
    assert (tmp_path / "v.parquet").stat().st_mtime_ns == before
    assert files(tmp_path) == ["v.parquet"]


def test_killed_in_the_merge_it_leaves_no_half_file(
    embedded: Path, tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tissue, tmp_path / "v.parquet")
    with monkeypatch.context() as patched:

        def stop(*_: Any, **__: Any) -> None:
            raise Stop

        patched.setattr(embed_module, "write_vectors", stop)
        with pytest.raises(Stop):
            run(settings)
    (tmp_path / ".v.parquet.tmp-1").write_bytes(b"half")
    assert run(settings) == 0
    assert (tmp_path / "v.parquet").read_bytes() == embedded.read_bytes()
    assert files(tmp_path) == ["v.parquet"]


def test_killed_between_its_two_files_no_old_vectors_stand_beside_new_keys(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "v.safetensors"
    assert run(config(tissue, out)) == 0
    with monkeypatch.context() as patched:

        def stop(*_: Any) -> None:
            raise Stop

        patched.setattr(embed_files, "_write_safetensors", stop)
        with pytest.raises(Stop):
            run(config(tissue, out, source=str(tissue / "tiles"), overwrite=True))
    assert not out.exists()
    assert run(config(tissue, out, source=str(tissue / "tiles"), overwrite=True)) == 0
    assert files(tmp_path) == ["v.keys.jsonl", "v.safetensors"]


def test_parts_of_another_job_are_never_mixed_in(
    tissue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "v.parquet"
    parts = interrupt(monkeypatch, config(tissue, out), after=2)
    before = files(parts)
    for changes, words in (
        ({"encoder": "random", "image_size": SIZE}, "another encoder"),
        ({"image_size": 48}, "another image_size"),
        ({"source": str(tissue / "tiles")}, "another data"),
        ({"precision": "bf16"}, "another precision"),
    ):
        with pytest.raises(InputError, match=f"holds parts of a job with {words}; .*--overwrite"):
            run(config(tissue, out, **changes))
    assert files(parts) == before
    kept = {path.name: path.read_bytes() for path in parts.glob("part-*")}
    assert run(config(tissue, out, image_size=48, overwrite=True)) == 0
    assert "parts of a job with another image_size are thrown away" in caplog.text
    assert run(config(tissue, tmp_path / "w.parquet", image_size=48)) == 0
    assert out.read_bytes() == (tmp_path / "w.parquet").read_bytes()
    # a part knows its job also where the folder says nothing of it
    parts.mkdir()
    for name, content in kept.items():
        (parts / name).write_bytes(content)
    assert run(config(tissue, out, image_size=48, overwrite=True)) == 0
    assert out.read_bytes() == (tmp_path / "w.parquet").read_bytes()


def test_a_second_job_into_the_same_file_is_kept_out(tissue: Path, tmp_path: Path) -> None:
    parts = tmp_path / "v.parquet.parts"
    parts.mkdir()
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(parts / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(InputError, match="another job is writing here"):
            run(config(tissue, tmp_path / "v.parquet"))
        other.communicate(b"\n")


def test_shares_are_contiguous_and_complete() -> None:
    for todo, world in ((list(range(10)), 4), ([3, 5], 4), ([], 2)):
        shares = [mine(todo, rank, world) for rank in range(world)]
        assert sum(shares, []) == todo
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
