"""The journal: every line strict JSON, a torn line harmless, a rewind exact, no secret written."""

from __future__ import annotations

import json
import math
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ca2cl.common.records import json_line
from ca2cl.common.redact import redact
from ca2cl.errors import InputError
from ca2cl.tracking.journal import Journal, read_journal, training_lines, watch_lines
from ca2cl.tracking.system_metrics import SystemSampler

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def records(path: Path) -> list[dict[str, Any]]:
    return [record for record, _ in read_journal(path)]


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(st.text(), VALUES, max_size=5))
def test_every_record_becomes_one_line_of_strict_json(record: dict[str, Any]) -> None:
    line = json_line(record)
    assert line.count(b"\n") == 1
    json.loads(line, parse_constant=refuse_constant)


def test_nonfinite_numbers_become_null_and_are_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.1})
    (record,) = records(journal.path)
    assert record["loss"] is None and record["grad_norm"] is None and record["lr"] == 0.1
    assert record["nonfinite"] == {"loss": "nan", "grad_norm": "inf"}


def test_reading_goes_on_from_any_line_end(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 6):
        journal.append({"step": step, "loss": 0.5})
    ends = [end for _, end in read_journal(journal.path)]
    assert ends[-1] == journal.path.stat().st_size
    assert [record["step"] for record, _ in read_journal(journal.path, ends[2])] == [4, 5]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_not_read_and_is_cut_when_the_journal_opens_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.append({"step": 1, "loss": 1.0})
    journal.append({"step": 2, "loss": 2.0})
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    assert [record["step"] for record in records(path)] == [1]
    Journal(path).append({"step": 2, "loss": 3.0})
    assert [(record["step"], record["loss"]) for record in records(path)] == [(1, 1.0), (2, 3.0)]


def test_a_torn_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path).append({"step": 1, "loss": 1.0})
    with path.open("ab") as file:
        file.write(b"x" * 200_000)
    Journal(path).append({"step": 2, "loss": 1.0})
    assert [record["step"] for record in records(path)] == [1, 2]


def test_a_damaged_line_in_the_middle_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff{\n[1]\n{"step": 2}\n')
    assert [record["step"] for record in records(path)] == [1, 2]
    assert sum("damaged" in message for message in caplog.messages) == 2


def test_rewinding_drops_later_training_lines_and_keeps_events(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 6):
        journal.append({"step": step, "loss": float(step)})
        journal.append({"event": "watch", "in_step": step, "watch/rank": float(step)})
        journal.append({"event": "tag", "name": f"t{step}", "in_step": step})
    with journal.path.open("ab") as file:
        file.write(b"\xff damaged\n")
    assert journal.rewind_to_step(3) == 4
    journal.append({"step": 4, "loss": 40.0})
    assert [line["step"] for line in watch_lines(journal.path)] == [1, 2, 3]
    assert [line["loss"] for line in training_lines(journal.path)] == [1.0, 2.0, 3.0, 40.0]
    assert [r["name"] for r in records(journal.path) if "name" in r] == ["t1", "t2", "t3", "t4", "t5"]


def test_rewinding_past_the_end_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"step": 1, "loss": 1.0})
    inode = journal.path.stat().st_ino
    assert journal.rewind_to_step(7) == 0
    assert journal.path.stat().st_ino == inode


def test_threads_never_mix_their_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")

    def write(number: int) -> None:
        for place in range(200):
            journal.append({"event": "x", "writer": number, "place": place, "pad": "é" * 50})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = records(journal.path)
    assert len(found) == 800
    for number in range(4):
        assert [r["place"] for r in found if r["writer"] == number] == list(range(200))


def test_a_full_disk_is_one_clear_line_and_leaves_no_part_of_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"step": 1, "loss": 1.0})
    size = journal.path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # the next line fits in part
    try:
        with pytest.raises(InputError, match="free some space"):
            journal.append({"step": 2, "loss": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert journal.path.stat().st_size == size
    journal.append({"step": 2, "loss": 3.0})
    assert [record["loss"] for record in records(journal.path)] == [1.0, 3.0]


def test_secrets_in_uris_are_never_written(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    uri = "https://user:hunter2@host:5000/a?token=hunter2&x=1"
    journal.append({"event": "params", "params": {"uri": uri, "list": [uri]}})
    assert "hunter2" not in journal.path.read_text()
    assert redact(uri) == "https://host:5000/a?token=***&x=1"
    assert redact("sqlite:////data/runs/mlflow.db") == "sqlite:////data/runs/mlflow.db"


@pytest.mark.parametrize("behind", [86_400, -86_400])
def test_system_lines_go_on_growing_whatever_the_clock_says(
    behind: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, real = tmp_path / "journal.jsonl", time.time
    created = real()
    for start in range(3):
        journal = Journal(path)
        sampler, lines = SystemSampler(journal, tmp_path, created, interval=0.01).start(), len(records(path))
        while len(records(path)) < lines + 2:
            time.sleep(0.01)
        sampler.stop()
        journal.close()
        shift = behind * (start + 1)
        monkeypatch.setattr(time, "time", lambda shift=shift: real() - shift)
    ticks = [record["tick"] for record, _ in read_journal(path)]
    assert len(ticks) > 5 and ticks == sorted(ticks) and ticks[0] == 0 and ticks[-1] >= 2
    assert "damaged" not in caplog.text
