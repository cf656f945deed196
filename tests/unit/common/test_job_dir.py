"""A job's directory: whose it is, its lock, what a refused or killed start leaves; names of a grid's trials."""

from __future__ import annotations

import errno
import fcntl
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ca2cl.common import locks
from ca2cl.common.grid import AGAIN, Grid, folder_name
from ca2cl.common.job_dir import JobDir, changed, job_record
from ca2cl.common.locks import Locked, exclusive_lock
from ca2cl.common.records import read_fields
from ca2cl.errors import InputError
from ca2cl.evaluation.finetune.trial import Trial, trial_grid
from ca2cl.reproduce.linear import LinearTrial
from tests.support.jobs import ROOT

OUTLIVED = """
import os, sys, time
from pathlib import Path
from ca2cl.common.locks import exclusive_lock
with exclusive_lock(Path(sys.argv[1]), per_process=sys.argv[2] == "process"):
    if os.fork() == 0:
        os.close(1)  # or the test would wait for this one
        time.sleep(20)
        os._exit(0)
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    os._exit(0)
"""


def test_a_record_names_what_changed_and_a_setting_of_a_newer_version_is_no_change(tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job", "this.json")
    assert not job.check(job_record({"lr": 0.1}))
    job.path.mkdir()
    job.write(job_record({"lr": 0.1}))
    assert job.check(job_record({"lr": 0.1, "momentum": 0.9}))
    with pytest.raises(InputError, match=r"^output_dir '.*/job' holds another job \(lr 0\.1 -> 0\.2\): use those"):
        job.check(job_record({"lr": 0.2}))
    (job.path / "this.json").write_text('{"setting": 1}')
    with pytest.raises(InputError, match=r"this\.json: damaged \(KeyError.*use another output_dir"):
        job.check(job_record({"lr": 0.1}))
    assert changed({"a": 1}, {"a": 2, "b": 3}) == ["a 1 -> 2"]


def test_a_folder_with_other_files_is_refused_before_a_lock_is_left_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with ExitStack() as held, pytest.raises(InputError, match="is not empty and holds no such job"):
        JobDir(tmp_path).begin(job_record({}), held)
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_refused_start_leaves_no_folder_and_a_killed_ones_half_written_files_go(tmp_path: Path) -> None:
    job = JobDir(tmp_path / "job", temporaries=("", "parts"))
    with ExitStack() as held:
        assert not job.begin(job_record({}), held, 0.0)
        job.write(job_record({}))
        job.withdraw()
    assert not job.path.exists()
    (job.path / "parts").mkdir(parents=True)
    for name in (".a.tmp-1", "parts/.b.tmp-2", "parts/whole"):
        (job.path / name).write_bytes(b"x")
    with job.locked(0.0):
        pass
    assert sorted(path.name for path in job.path.rglob("*")) == [".lock", "parts", "whole"]


@pytest.mark.parametrize("kind", ["process", "file"])
def test_a_record_lock_ends_with_its_process_and_names_it_while_a_fork_keeps_flock(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", OUTLIVED, str(path), kind]
    holder = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    number = holder.stdout.readline().strip()
    with pytest.raises(Locked) as busy, exclusive_lock(path, 0.0, per_process=kind == "process"):
        pass
    assert str(busy.value) == (f" (process {number})" if kind == "process" else "")
    holder.communicate("\n")
    if kind == "process":
        with exclusive_lock(path, 0.0):
            pass
    else:
        with pytest.raises(Locked), exclusive_lock(path, 0.0, per_process=False):
            pass


def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    for _ in range(2):
        with exclusive_lock(tmp_path / "lock"):
            pass
    assert [record.levelname for record in caplog.records if record.name == locks.__name__] == ["WARNING"]
    with pytest.raises(OSError, match="No locks"), exclusive_lock(tmp_path / "lock", required=True):
        pass


def test_trials_are_done_where_their_file_is_and_have_the_names_that_folders_have_had() -> None:
    assert Trial("encoder", 0.01, 0).name == "encoder-1pct-seed0"
    assert Trial("random", 20, 3).name == "random-20-per-class-seed3"
    assert LinearTrial("linear SGD", 0.5, 1).name == "linear-SGD-50pct-seed1"
    assert folder_name("../runs/a b") == "runs-a-b-d0deaf54" and folder_name("..") != folder_name("...")


def test_what_is_missing_keeps_its_order(tmp_path: Path) -> None:
    grid: Grid[Trial] = trial_grid(tmp_path, ("encoder", "random"), (0.1, 1.0), 1)
    done = grid[Trial("encoder", 1.0, 0)]
    assert done == tmp_path / "cells" / "encoder-100pct-seed0" / "result.json"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"scores": 1}))
    assert grid.missing() == [Trial("encoder", 0.1, 0), Trial("random", 0.1, 0), Trial("random", 1.0, 0)]
    assert read_fields(done, ("scores",), AGAIN) == {"scores": 1}
    with pytest.raises(InputError, match=r"result\.json: damaged, lacks steps; delete its folder"):
        read_fields(done, ("steps",), AGAIN)
