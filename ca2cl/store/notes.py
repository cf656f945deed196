"""Tags that MLflow's pages show: who made a run, and its description."""

from __future__ import annotations

import getpass
import os

DESCRIPTION = "mlflow.note.content"
_LONGEST = 5000
"""Characters that every MLflow server takes as a tag's value."""


def source_tags() -> dict[str, str]:
    """The user and the program that a run is made by."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return {"mlflow.source.name": "ca2cl", "mlflow.source.type": "LOCAL", "mlflow.user": user}


def description_tag(text: str) -> dict[str, str]:
    """A run's description in Markdown, cut to what every server takes."""
    return {DESCRIPTION: text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]}\n..."}


def code_block(text: str) -> str:
    """A table of the terminal as Markdown; one that is too long loses its last lines."""
    lines, length = list[str](), 0
    for line in text.strip("\n").splitlines():
        length += len(line) + 1
        if length > _LONGEST - 600:
            lines.append("...")
            break
        lines.append(line)
    return "```\n" + "\n".join(lines) + "\n```"


def short_name(uri: str) -> str:
    """An encoder in a run's name: eight digits of a run id, ``NAME/VERSION``, or the last part of a path. Of the folder
    ``encoder`` in a run's folder it is the run's name."""
    if uri.startswith("runs:/"):
        return uri.removeprefix("runs:/")[:8]
    if uri.startswith("models:/"):
        return uri.removeprefix("models:/")
    return uri.rstrip("/").removesuffix("/encoder").rpartition("/")[2] or uri
