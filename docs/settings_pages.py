"""Write a page of settings for each verb, from the docstrings of its dataclass."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path

from ca2cl.cli.fields import groups_of, shown
from ca2cl.cli.verbs import VERBS


def page(verb: str) -> str:
    """The page of one verb, in Markdown."""
    kind = getattr(importlib.import_module(VERBS[verb].settings_module), VERBS[verb].settings)
    lines = [f"# ca2cl {verb}", "", f"{VERBS[verb].summary.replace('->', '→')}.", ""]
    for group in groups_of(kind):
        if not group.fields:
            continue
        lines += [f"## {group.name}" if group.name else "## Settings", "", group.text, ""]
        for field in group.fields:
            lines += [f"`--{field.name}` (`{shown(field.default)}`)", f": {field.text}", ""]
    return "\n".join(lines)


def write_pages(folder: Path) -> None:
    """Write ``VERB.md`` for every verb with settings, and their table of contents."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    verbs = [verb for verb in VERBS if VERBS[verb].settings]
    for verb in verbs:
        (folder / f"{verb.replace(' ', '-')}.md").write_text(page(verb), encoding="utf-8")
    contents = "\n".join(verb.replace(" ", "-") for verb in verbs)
    (folder / "index.md").write_text(
        "# Settings\n\nEvery setting of every verb, with its default. They are given as `--group.field value`, or in a "
        "YAML file by `--config FILE`.\n\n```{toctree}\n:maxdepth: 1\n\n" + contents + "\n```\n",
        encoding="utf-8",
    )
