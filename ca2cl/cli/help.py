"""Help texts of the verbs: examples and first settings, or every setting."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence

from ca2cl.cli.examples import EXAMPLES, FIRST
from ca2cl.cli.fields import REQUIRED, Field, Group, placeholder, shown

_NARROWEST, _WIDEST = 60, 100
_RECIPE = "Settings of a shipped recipe, before the flags after it: "


def short_help(verb: str, groups: Sequence[Group], positional: Sequence[str], recipes: Sequence[str]) -> str:
    """What the verb does, examples, and the settings to begin with.

    Args:
        verb: its name.
        groups: its settings.
        positional: settings that are given without their names.
        recipes: names of shipped recipes; empty for verbs without any.
    """
    fields = {field.name: field for group in groups for field in group.fields}
    required = [name for name, field in fields.items() if field.default is REQUIRED]
    first = list(dict.fromkeys([*required, *FIRST.get(verb, ())]))
    parts = [_usage(verb, fields, positional, required), _wrapped(groups[0].text, 0), "examples:"]
    parts[-1] += "".join(f"\n  # {why}\n{_command(line)}" for why, line in EXAMPLES[verb])
    if first:
        parts.append("settings to begin with:" + "".join(_setting(fields[name], positional) for name in first))
    if recipes:
        parts[-1] += f"\n  --recipe NAME\n{_wrapped(_RECIPE + ', '.join(recipes) + '.', 6)}"
    if len(first) < len(fields):
        parts.append(f"ca2cl {verb} --help_all shows all {len(fields)} settings.")
    return "\n\n".join(parts) + "\n"


def long_help(
    verb: str, groups: Sequence[Group], positional: Sequence[str], recipes: Sequence[str], files: bool
) -> str:
    """Every setting by group, with its default.

    Args:
        verb: its name.
        groups: its settings.
        positional: settings that are given without their names.
        recipes: names of shipped recipes; empty for verbs without any.
        files: whether the verb takes files of settings.
    """
    fields = {field.name: field for group in groups for field in group.fields}
    required = [name for name, field in fields.items() if field.default is REQUIRED]
    parts = [_usage(verb, fields, positional, required), _wrapped(groups[0].text, 0)]
    if files:
        flags = {"config FILE": "YAML file of settings, before the flags after it."}
        if recipes:
            flags["recipe NAME"] = f"{_RECIPE}{', '.join(recipes)}."
        flags["print_config"] = "Print the settings that result, as YAML, and exit."
        parts.append("\n".join(f"  --{flag}\n{_wrapped(text, 6)}" for flag, text in flags.items()))
    for group in groups:
        if group.fields:
            title = f"{group.name}: {group.text}" if group.name else "settings:"
            parts.append(_wrapped(title, 0) + "".join(_setting(field, positional) for field in group.fields))
    return "\n\n".join(parts) + "\n"


def overview(verbs: Mapping[str, str]) -> str:
    """The verbs with their summaries.

    Args:
        verbs: name → summary.
    """
    indent = 4 + max(map(len, verbs))
    wrap = textwrap.TextWrapper(_width(), subsequent_indent=" " * indent, break_on_hyphens=False)
    return "\n".join(wrap.fill(f"  {name:{indent - 2}}{summary}") for name, summary in verbs.items())


def _usage(verb: str, fields: dict[str, Field], positional: Sequence[str], required: Sequence[str]) -> str:
    words = [f"{name.upper()} ..." if "..." in placeholder(fields[name].hint) else name.upper() for name in positional]
    words = [word if name in required else f"[{word}]" for name, word in zip(positional, words, strict=True)]
    words += [f"--{name} {placeholder(fields[name].hint)}" for name in required if name not in positional]
    lead = f"usage: ca2cl {verb} "
    text = textwrap.wrap(" ".join([*words, "[--setting VALUE ...]"]), _width() - len(lead), break_on_hyphens=False)
    return lead + f"\n{' ' * len(lead)}".join(text)


def _setting(field: Field, positional: Sequence[str]) -> str:
    name = field.name.upper() if field.name in positional else f"--{field.name} {placeholder(field.hint)}"
    default = "" if field.default is REQUIRED else f" (default: {shown(field.default)})"
    return f"\n  {name}{default}\n{_wrapped(field.text, 6)}"


def _command(line: str) -> str:
    """A command, continued on further lines where it is long; a flag stays with its value."""
    words, rows = re.split(r" (?=-)", line), ["  "]
    for word in words:
        if len(rows[-1]) + len(word) > _width() - 3 and rows[-1].strip():
            rows.append("      ")
        rows[-1] += word if rows[-1].isspace() else f" {word}"
    return " \\\n".join(rows)


def _wrapped(text: str, indent: int) -> str:
    paragraphs = text.replace("``", "`").split("\n\n")
    wrap = textwrap.TextWrapper(
        _width(), initial_indent=" " * indent, subsequent_indent=" " * indent, break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
    return "\n\n".join(wrap.fill(paragraph) for paragraph in paragraphs)


def _width() -> int:
    return max(_NARROWEST, min(_WIDEST, shutil.get_terminal_size((80, 24)).columns))
