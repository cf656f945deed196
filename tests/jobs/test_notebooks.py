"""The notebooks of docs/notebooks: executed in the slow tests; small, and their code parses, in every run."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import ROOT

FOLDER = ROOT / "docs" / "notebooks"
NAMES = ("your_tiles", "what_it_learned")
"""In the order of a reader: the second goes on in the folder of the first."""


def cells(name: str) -> list[dict[str, Any]]:
    return list(json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_light_and_its_code_parses(name: str) -> None:
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 300_000
    for cell in cells(name):
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", []))
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and not source.startswith("!"):
            ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))


@pytest.mark.slow
def test_the_notebooks_run_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = (pytest.importorskip(one) for one in ("nbclient", "nbformat"))
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    for name in NAMES:
        book = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        where = {"metadata": {"path": str(tmp_path)}}
        nbclient.NotebookClient(book, timeout=600, kernel_name="python3", resources=where).execute()
        told = "".join(output.get("text", "") for cell in book.cells for output in cell.get("outputs", []))
        assert "error:" not in told  # of a command: a cell with ! does not fail by its exit code
        if name == NAMES[0]:
            assert (tmp_path / "runs" / "first" / "encoder" / "encoder.safetensors").is_file()
            results = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))["results"]
            assert {row["features"] for row in results} == {"encoder", "colour histogram", "random encoder"}
