"""Write a page of each notebook, with the outputs that are stored in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def page(notebook: Path) -> str:
    """A notebook in Markdown; pictures are data URIs."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shell = source.startswith("!")
        shown = re.sub(r"^!", "", source, flags=re.MULTILINE) if shell else source
        parts.append(f"```{'bash' if shell else 'python'}\n{shown}\n```")
        parts += [text for output in cell["outputs"] if (text := _output(output))]
    title, *rest = parts
    link = f"This page is a notebook, [`{notebook.name}`]({notebook.name}). Download it and run it, cell by cell."
    head, _, intro = title.partition("\n")
    return "\n\n".join([head, link, intro.strip(), *rest]) + "\n"


def _output(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{_COLOURS.sub('', ''.join(output['text'])).rstrip()}\n```"
    data = output.get("data", {})
    kind = next((kind for kind in ("image/jpeg", "image/png") if kind in data), None)
    return f"![output](data:{kind};base64,{''.join(data[kind]).strip()})" if kind else ""


def write_pages(folder: Path) -> None:
    """Write ``NAME.md`` beside every ``NAME.ipynb`` of a folder."""
    for notebook in sorted(folder.glob("*.ipynb")):
        notebook.with_suffix(".md").write_text(page(notebook), encoding="utf-8")
