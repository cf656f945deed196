"""Write a page of settings for each verb, from the docstrings of its dataclass."""

from __future__ import annotations

import dataclasses
import importlib
import shutil
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstring_parser import parse_from_object

from ca2cl.cli.verbs import VERBS


class Setting(typing.NamedTuple):
    """A setting by its dotted name, with its default as the command line takes it."""

    name: str
    default: str
    text: str


def settings_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str, list[Setting]]]:
    """Each group of a verb's settings: its name, its text, and the settings in it; the verb's own are first."""
    texts = {entry.arg_name: entry.description or "" for entry in parse_from_object(kind).params}
    hints, own, groups = typing.get_type_hints(kind), list[Setting](), list[Any]()
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            groups.append((hint, f"{prefix}{field.name}."))
        else:
            own.append(Setting(prefix + field.name, shown(field), " ".join(texts.get(field.name, "").split())))
    yield prefix.rstrip("."), textwrap.dedent(kind.__doc__ or "").strip(), own
    for group, inner in groups:
        yield from settings_of(group, inner)


def shown(field: dataclasses.Field[Any]) -> str:
    """A default as text; "required" where there is none."""
    missing = dataclasses.MISSING
    if field.default is missing and field.default_factory is missing:
        return "required"
    value = field.default if field.default is not missing else field.default_factory()  # type: ignore[misc]
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "[]"
    return str(value) if value != "" else '""'


def page(verb: str) -> str:
    """The page of one verb, in Markdown."""
    kind = getattr(importlib.import_module(VERBS[verb].settings_module), VERBS[verb].settings)
    lines = [f"# ca2cl {verb}", "", f"{VERBS[verb].summary.replace('->', '→')}.", ""]
    for group, text, settings in settings_of(kind):
        if not settings:
            continue
        lines += [f"## {group}" if group else "## Settings", "", text if group else first_paragraphs(text), ""]
        for setting in settings:
            lines += [f"`--{setting.name}` (`{setting.default}`)", f": {setting.text or 'See above.'}", ""]
    return "\n".join(lines)


def first_paragraphs(text: str) -> str:
    """A dataclass's description without its list of attributes."""
    return text.partition("\n\nAttributes:")[0]


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
