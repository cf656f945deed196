"""A process that is killed while it writes checkpoints leaves a whole one, whenever that is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.jobs import start


def killed_writers(folder: Path, rounds: int) -> dict[str, int]:
    ended = start(
        [sys.executable, "-m", "tests.support.checkpoint_writer", str(folder / "c"), str(rounds), "1"], folder
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, int] = json.loads(ended.stdout)
    assert found["valid"] == rounds and found["steps"] > 0
    return found


def test_a_writer_that_is_killed_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    assert killed_writers(tmp_path, 20)["killed_while_writing"] >= 3


@pytest.mark.slow
def test_two_hundred_writers_that_are_killed_leave_whole_checkpoints(tmp_path: Path) -> None:
    assert killed_writers(tmp_path, 200)["killed_while_writing"] >= 30
