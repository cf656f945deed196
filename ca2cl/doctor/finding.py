"""Result of one check, and how results are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "wrong"]
_MARKS: dict[State, str] = {"ok": "ok   ", "note": "note ", "wrong": "WRONG"}


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


def as_text(findings: Sequence[Finding]) -> str:
    """All findings, a line each with the remedy below it, and the verdict."""
    width = max(len(finding.area) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARKS[finding.state]} {finding.area:{width}}  {finding.text}")
        if finding.remedy:
            lines.append(f"{'':{len(_MARKS['ok']) + 1 + width}}  -> {finding.remedy}")
    wrong = [finding.area for finding in findings if finding.state == "wrong"]
    verdict = f"{len(wrong)} to mend: {', '.join(wrong)}" if wrong else "nothing is wrong"
    return "\n".join([*lines, "", f"verdict: {verdict}"]) + "\n"
