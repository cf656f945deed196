"""Result of one check, and how results are printed."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]
_MARKS: dict[State, str] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}
_WIDTH = len("shared memory")


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        area: what was looked at, a word or two.
        state: ok; note: works, but read it; wrong: a job would fail or crawl.
        text: what was found, in one line with its numbers.
        remedy: what to do about it; every wrong has one.
    """

    area: str
    state: State
    text: str
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.remedy or self.state != "wrong", self


def shown(findings: Iterable[Finding]) -> Iterator[str]:
    """Each finding as text with the remedy below it, as soon as it is there, and at the end the verdict."""
    wrong = []
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    for finding in findings:
        yield _line(finding, room)
        wrong += [finding.area] if finding.state == "wrong" else []
    verdict = f"{len(wrong)} to mend: {', '.join(wrong)}" if wrong else "nothing is wrong"
    yield f"\nverdict: {verdict}\n"


def _line(finding: Finding, room: int) -> str:
    lead, indent = f"{_MARKS[finding.state]} {finding.area:{_WIDTH}}  ", " " * (len(_MARKS["ok"]) + _WIDTH + 3)
    rows = [lead + finding.text, *([f"{indent}-> {finding.remedy}"] if finding.remedy else [])]
    if room < sys.maxsize:
        rows = [textwrap.fill(row, room, subsequent_indent=indent, break_on_hyphens=False) for row in rows]
    return "\n".join(rows) + "\n"


def as_text(findings: Iterable[Finding]) -> str:
    """All findings, a line each with the remedy below it, and the verdict."""
    return "".join(shown(findings))
