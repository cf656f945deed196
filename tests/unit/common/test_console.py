"""Progress where there is no terminal, tables that fit one, and the last lines of a verb."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

from ca2cl.common.console import progress
from ca2cl.common.console.summary import PART, closing
from ca2cl.common.tables import fitted


def test_without_a_terminal_a_long_stage_is_lines_and_a_short_one_is_silent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    assert list(progress.ProgressBar(range(3), desc="short", unit="tile")) == [0, 1, 2]
    with progress.ProgressBar(total=2, desc="short") as bar:
        bar.set_postfix_str("loss 1")
    assert not caplog.messages
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.ProgressBar(total=2, desc="long", unit="tile") as bar:
        for loss in (0.5, 0.25):
            bar.set_postfix_str(f"loss {loss}")
            bar.update()
    assert caplog.messages[-1].startswith("long: 2 of 2 tiles, ") and caplog.messages[-1].endswith(" left, loss 0.25")
    assert "left" in caplog.messages[0] and capfd.readouterr().err == ""


def test_what_is_hidden_has_neither_bar_nor_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    with progress.ProgressBar(range(3), desc="x", disable=True) as bar:
        bar.set_postfix_str("loss 1")
        assert list(bar) == [0, 1, 2]
    assert not caplog.messages


def test_a_table_is_blocks_on_a_terminal_that_is_too_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, rows = ["name", "value"], [["a" * 50, "b" * 50], ["c", "d"]]
    piped = fitted(heads, rows)
    assert len(piped.splitlines()) == 4 and "-" * 50 in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert fitted(heads, rows) == f"name   {'a' * 50}\nvalue  {'b' * 50}\n\nname   c\nvalue  d\n"
    assert fitted(heads, rows[1:]).splitlines()[1] == "----  -----"


def test_the_last_lines_quote_words_hide_secrets_and_are_left_out_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PART, raising=False)
    told = closing("shards", Path("a b"), ["ca2cl", "report", "a b"], "look at http://me:secret@host/x")
    lines = ["", "made  shards", "in    a b", "next  ca2cl report 'a b'", "      look at http://host/x", ""]
    assert told == "\n".join(lines)
    monkeypatch.setitem(os.environ, PART, "1")
    assert closing("shards", "x") == ""
