"""Explain in one line why arguments do not fit a verb's settings."""

from __future__ import annotations

import ast
import contextlib
import re
from collections.abc import Collection, Mapping, Sequence

from ca2cl.cli.fields import REQUIRED, Field, choices, expected
from ca2cl.errors import nearest

_VALUE = re.compile(r"(?:Got value|Given value): (.*)$")
_KEY = re.compile(r'Parser key "([\w.]+)"')
_UNKNOWN = re.compile(r"unrecognized arguments: --([\w.]+)|option '([\w.]+)'")
_LOOSE = re.compile(r"unrecognized arguments: (.*)")
_EMPTY = re.compile(r"argument --([\w.]+): expected one argument")
_REQUIRED = re.compile(r"following arguments are required: (.*)|Key \"([\w.]+)\" is required")
_LONGEST = 60


def explain(
    message: str,
    verb: str,
    fields: Mapping[str, Field],
    positional: Sequence[str] = (),
    given: Collection[str] = (),
) -> str:
    """A parser's complaint as the setting, its value and the remedy.

    Args:
        message: of jsonargparse or argparse.
        verb: name of the verb.
        fields: its settings by their dotted names.
        positional: those that are given without their names.
        given: names of those that were given.
    """
    message = " ".join(message.split())
    if found := _UNKNOWN.search(message):
        group = re.search(r"Group '([\w.]+)'", message)
        name = found.group(1) or found.group(2)
        return unknown(f"{group.group(1)}.{name}" if group else name, verb, list(fields))
    if (key := _KEY.search(message)) and key.group(1) in fields:
        return _wrong(fields[key.group(1)], message)
    if found := _REQUIRED.search(message):
        names = [name.strip() for name in (found.group(1) or found.group(2)).split(",")]
        shown = [name.upper() if name in positional else f"--{name}" for name in names]
        places = "".join(f" {name.upper()}" for name in positional) if set(names) & set(positional) else ""
        usage = f": ca2cl {verb}{places}{' ...' if set(names) - set(positional) else ''}" if places else ""
        return f"{_and(shown)} must be given{usage}; see ca2cl {verb} --help"
    if (empty := _EMPTY.search(message)) and empty.group(1) in fields:
        return f"{empty.group(1)} has no value: give {expected(fields[empty.group(1)].hint)}"
    if found := _LOOSE.search(message):
        if found.group(1).startswith("-"):
            word = found.group(1).split()[0]
            return f"unknown setting {word}: settings begin with two hyphens; ca2cl {verb} --help has them"
        missing = [name for name, field in fields.items() if field.default is REQUIRED and name not in given]
        if missing:
            pairs = zip(missing, found.group(1).split(), strict=False)
            meant = " ".join(f"--{name} {word}" for name, word in pairs)
            return f"{found.group(1)!r} has no name: did you mean {meant}?"
        return f"{found.group(1)!r} belongs to no setting; put values behind their flag, and quote those with spaces"
    return message


def unknown(name: str, verb: str, known: Sequence[str]) -> str:
    """An unknown setting with the nearest known ones: ``lr`` is ``optim.lr``, ``run.out`` is ``run.output_dir``."""
    last = name.rpartition(".")[2]
    ends = [one for one in known if one.rpartition(".")[2] == last]
    begun = [one for one in known if one.startswith(name)]
    if not ends and len(begun) == 1:
        ends = begun
    if len(ends) > 1:
        return f"unknown setting {name}: did you mean {', '.join(ends[:-1])} or {ends[-1]}?"
    if ends:
        return f"unknown setting {name}: did you mean {ends[0]}?"
    remedy = nearest(name, known)
    if not remedy.startswith("did you mean"):
        remedy = f"ca2cl {verb} --help_all lists all of them"
    return f"unknown setting {name}: {remedy}"


def _wrong(field: Field, message: str) -> str:
    """A value of another type."""
    found = _VALUE.search(message)
    value = found.group(1).strip() if found else ""
    if value.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            value = " ".join(map(str, ast.literal_eval(value)))
    remedy = "use" if choices(field.hint) else "give"
    return f"{field.name} is {value[:_LONGEST]!r}: {remedy} {expected(field.hint)}"


def _and(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
