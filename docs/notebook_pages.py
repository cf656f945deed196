"""Write a page of each notebook, with the outputs that are stored in it.

To store the outputs of a notebook that was run in the working directory:

python docs/notebook_pages.py your_tiles.ipynb
"""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_MOST_PIXELS = (640, 480)
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
    pictures = [f"![output](data:{kind};base64,{''.join(data).strip()})" for kind, data in _picture(output).items()]
    return pictures[0] if pictures else f"```text\n{_text(output).rstrip()}\n```"


def _picture(output: dict[str, Any]) -> dict[str, Any]:
    return {kind: data for kind, data in output.get("data", {}).items() if kind in ("image/jpeg", "image/png")}


def _text(output: dict[str, Any]) -> str:
    """What an output says; nothing beside a picture."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    return "" if _picture(output) else "".join(output.get("data", {}).get("text/plain", ())) + "\n"


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
        text = "".join(_plain(_text(output)) for output in cell["outputs"])
        pictures = [picture for output in cell["outputs"] if (picture := _picture(output))]
        cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": text}] if text else []
        data = [{"image/jpeg": _lighter(encoded)} for picture in pictures for encoded in picture.values()]
        cell["outputs"] += [{"output_type": "display_data", "data": one, "metadata": {}} for one in data]
    text = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
    (HERE / "notebooks" / notebook.name).write_text(text, encoding="utf-8")


def _lighter(encoded: str) -> str:
    from PIL import Image

    out = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    picture.thumbnail(_MOST_PIXELS)
    picture.save(out, "JPEG", quality=50, optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _plain(text: str) -> str:
    """What is left on a terminal in the end, but for the bars."""
    text = _COLOURS.sub("", text).replace(str(Path.cwd()), ".").replace("\r\n", "\n")
    lines = (line.rpartition("\r")[2] for line in text.splitlines())
    return "".join(f"{line}\n" for line in lines if line.strip() and not _BAR.search(line))


if __name__ == "__main__":
    store(Path(sys.argv[1]))
