"""Files that the documents name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MADE = {"settings/index.md"}
"""Pages that ``docs/build.sh`` writes."""
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def named(text: str) -> set[str]:
    """Paths of code and pages in backticks, and what links lead to."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    quoted = re.findall(r"`([\w.*-]+(?:/[\w.*-]+)+\.(?:py|sh|md))(?:::?\w+)?`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#\s]+)", text)
    return {*quoted, *linked}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_that_are_there(path: Path) -> None:
    places = (ROOT, ROOT / "ca2cl", path.parent)
    wanted = named(path.read_text()) - MADE
    missing = [name for name in wanted if not any(any(place.glob(name)) for place in places)]
    assert missing == []


def test_what_is_not_there_is_found() -> None:
    assert named("`a/b.py` [c](d/e.md#f) `g.py` [h](https://i/j.md) `k/l_*.sh`") == {"a/b.py", "d/e.md", "k/l_*.sh"}


RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").split("\n## ")[1:]


@pytest.mark.parametrize("section", RESULTS, ids=lambda section: section.partition("\n")[0])
def test_measured_numbers_name_command_commit_and_machine(section: str) -> None:
    head = section.split("\n\n")[1].replace("\n> ", " ")
    assert re.fullmatch(r"> Command: .+\. Commit: .+\. Machine: .+\.", head), head
    _, commit = re.split(r"Commit: ", head)
    assert re.search(r"\b[0-9a-f]{7}\b", commit), "a commit, or the one that added the numbers"
