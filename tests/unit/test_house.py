"""The import graph that ``benchmarks.house`` and the drawing of the architecture are made from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.architecture import draw
from benchmarks.house import Source
from benchmarks.imports import break_circles, circles, closure, import_graph, read_modules, reduced, room_imports

FILES = {
    "__init__.py": "",
    "cli.py": 'VERBS = {"go": Verb("goes", "ca2cl.go.run", "Go")}',
    "go/__init__.py": '"""A verb."""',
    "go/run.py": "from ca2cl.base import files\nfrom ca2cl.go.report import told\n\n\ndef run(a, b, c, d): ...",
    "go/report.py": (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ca2cl.go.run import run\n\n\n"
        "def told(a, b, *, c, d):\n    '''One line.'''\n\n    def inner():\n        import ca2cl.base.files\n"
    ),
    "base/__init__.py": "",
    "base/files.py": "import os  # from elsewhere\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / "ca2cl" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_imports_are_found_wherever_they_stand(root: Path) -> None:
    modules = read_modules(root)
    graph = import_graph(modules)
    assert graph["ca2cl.go.run"] == {"ca2cl.base.files", "ca2cl.go.report"}
    assert graph["ca2cl.go.report"] == {"ca2cl.base.files", "ca2cl.go.run"}
    assert circles(graph) == [{"ca2cl.go.run", "ca2cl.go.report"}]
    assert closure(graph, ["ca2cl.go.report"]) == {"ca2cl.go.run", "ca2cl.go.report", "ca2cl.base.files"}
    assert room_imports(modules, graph) == {("go", "base"): 2}


def test_what_is_counted(root: Path) -> None:
    counts = Source(root).counts(["go", "ca2cl.base.files", "nothing"])
    expected = {
        "files": "7",
        "circles of imports": "1",
        "circles of imports between folders": "0",
        "public functions": "2",
        "  with 4 parameters or more": "2",
        "  of these with a docstring of one line or none": "2",
        "  of these without Args:": "2",
        "imports of go: files / lines": "3 / 16",
        "imports of ca2cl.base.files: files / lines": "1 / 1",
        "imports of nothing: files / lines": "-",
        "lines of base": "1",
    }
    assert {label: counts[label].text for label in expected} == expected


def test_edges_that_follow_from_others_are_left_out() -> None:
    assert reduced({"a": {"b", "c", "d"}, "b": {"d"}, "c": {"d"}, "d": set()}) == {
        "a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set(),
    }  # fmt: skip


def test_a_circle_is_broken_at_its_thinnest_edge() -> None:
    graph, left_out = break_circles({"a": {"b"}, "b": {"a"}}, Counter({("a", "b"): 1, ("b", "a"): 3}))
    assert (graph, left_out) == ({"a": set(), "b": {"a"}}, [("a", "b")])
    assert draw(graph, left_out).count("<text") == 2
