"""Times of steps from a journal, and the steps and compute that follow from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ca2cl.errors import InputError
from ca2cl.study.compute import compute_rows, read_compute
from ca2cl.study.jobs import Job, progress
from ca2cl.study.timing import read_times

MACHINE = {"threads": 4, "processes": 2, "device": "cpu", "gpus": []}


def write_run(folder: Path, records: list[dict[str, Any]], **machine: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "journal.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps(MACHINE | machine))
    return folder


def step(number: int, time: float, cpu: float, rate: float = 32.0) -> dict[str, Any]:
    return {"time": time, "step": number, "samples": 64 * number, "loss": 1.0, "tiles_per_s": rate, "cpu_s": cpu}


def status(time: float, word: str) -> dict[str, Any]:
    return {"time": time, "event": "status", "status": word}


RECORDS = [
    status(0, "RUNNING"), step(1, 12, 9.0), step(2, 15, 8.0), {"time": 16, "event": "system"}, step(3, 19, 10.0),
    status(20, "KILLED"), status(1000, "RUNNING"), step(4, 1012, 12.0), step(5, 1014, 8.0), status(1015, "FINISHED"),
]  # fmt: skip


def test_cpu_seconds_are_a_threads_and_breaks_do_not_count(tmp_path: Path) -> None:
    times = read_times(write_run(tmp_path, RECORDS))
    assert times.clock == "cpu" and times.seconds == [2.25, 2.0, 2.5, 3.0, 2.0]
    assert times.wall == [2.0, 3.0, 4.0, 2.0, 2.0]  # the first of a start by its own rate: 64 tiles at 32 a second
    assert read_times(tmp_path, skip=2).cpu == [10.0, 12.0, 8.0]


def test_on_a_gpu_it_is_wall_time(tmp_path: Path) -> None:
    times = read_times(write_run(tmp_path, RECORDS, device="cuda", gpus=["H", "H"]))
    assert times.clock == "wall" and times.seconds == times.wall and times.gpus == 2


def test_a_run_of_an_older_version_has_no_times(tmp_path: Path) -> None:
    write_run(tmp_path, RECORDS)
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(InputError, match="its journal has no times"):
        read_times(tmp_path)


def test_compute_of_a_run(tmp_path: Path) -> None:
    job = Job(0, "a", 0, 10, tmp_path)  # every second step is in the journal
    write_run(job.folder, RECORDS)
    found = read_compute(job)
    assert (found.steps, found.clock, found.gpu_hours) == (10, "cpu", 0.0)
    assert found.minutes == pytest.approx(2 * 11.75 / 60) and found.wall_minutes == pytest.approx(2 * 13 / 60)
    assert found.cpu_hours == pytest.approx(2 * 47 * 2 / 3600)
    write_run(job.folder, RECORDS, device="cuda")
    on_gpu = read_compute(job)
    assert on_gpu.minutes == pytest.approx(13 / 60) and on_gpu.gpu_hours == pytest.approx(13 * 2 / 3600)
    ((*cells, hours),) = compute_rows([found], 0.5)
    assert cells == ["a", "1", "10", "0.5", "0.39 (0.39 to 0.39)", "0.43"] and hours == "0.0522 CPU h"


def test_progress_is_the_last_step_and_status(tmp_path: Path) -> None:
    assert progress(tmp_path) == (0, "")
    assert progress(write_run(tmp_path, RECORDS)) == (5, "FINISHED")
    assert progress(write_run(tmp_path, RECORDS[:5])) == (3, "RUNNING")
