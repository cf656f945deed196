"""Write a page of each notebook, with the outputs that are stored in it.

To store the outputs of a notebook that was run in the working directory:

python docs/notebook_pages.py your_tiles.ipynb
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_BAR = re.compile(r"\d+%\|")


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
        return f"```text\n{''.join(output['text']).rstrip()}\n```"
    data = output.get("data", {})
    kind = next((kind for kind in ("image/jpeg", "image/png") if kind in data), None)
    return f"![output](data:{kind};base64,{''.join(data[kind]).strip()})" if kind else ""


def write_pages(folder: Path) -> None:
    """Write ``NAME.md`` beside every ``NAME.ipynb`` of a folder."""
    for notebook in sorted(folder.glob("*.ipynb")):
        notebook.with_suffix(".md").write_text(page(notebook), encoding="utf-8")


def store(notebook: Path) -> None:
    """Write a notebook that was run to ``docs/notebooks``: without progress bars, colours, paths and counts."""
    book = json.loads(notebook.read_text(encoding="utf-8"))
    for cell in book["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] != "code":
            continue
        cell["execution_count"] = None
        texts = [_plain("".join(output["text"])) for output in cell["outputs"] if output["output_type"] == "stream"]
        shown = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
        kept = [{"output_type": "stream", "name": "stdout", "text": text} for text in ["".join(texts)] if text]
        cell["outputs"] = [*kept, *({**output, "metadata": {}} for output in shown)]
    text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    (HERE / "notebooks" / notebook.name).write_text(text, encoding="utf-8")


def _plain(text: str) -> str:
    """What is left on a terminal in the end, but for the bars."""
    text = _COLOURS.sub("", text).replace(str(Path.cwd()), ".").replace("\r\n", "\n")
    lines = (line.rpartition("\r")[2] for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line and not _BAR.search(line))


if __name__ == "__main__":
    store(Path(sys.argv[1]))
