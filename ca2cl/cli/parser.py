"""Parse a verb's settings from the command line and YAML files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ca2cl.cli.verbs import VERBS
from ca2cl.cli.yaml_files import read_flags
from ca2cl.common.plugins import names_code
from ca2cl.errors import InputError, nearest

_RECIPES = Path(__file__).parent.parent / "recipes"
_STUDY = "study_"
"""What the names of shipped studies begin with; they are no recipes of one verb."""
_NONE = "none"
MAY_NAME_CODE = frozenset({"method.name", "model.arch", "tracking.sinks", "source"})
"""Settings whose value may be module:attribute: a file, which may come from elsewhere, must not run code."""
_HOME = re.compile(r"([^/~=]*=)?(~.*)", re.DOTALL)


def parse(name: str, arguments: list[str]) -> Any:
    """The settings object of verb ``name``, or None when only help or the resolved configuration was asked for.

    Raises:
        InputError: the arguments do not fit the verb's settings.
    """
    import jsonargparse

    class Parser(jsonargparse.ArgumentParser):
        def format_help(self, *formatter: Any) -> str:
            return super().format_help(*formatter).replace("null", _NONE)  # the word that the explanations use

    verb = VERBS[name]
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = importlib.import_module(verb.settings_module)
    kind = getattr(module, verb.settings)
    positional: tuple[str, ...] = getattr(module, "POSITIONAL", ())
    parser = Parser(prog=f"ca2cl {name}", description=kind.__doc__, exit_on_error=False)
    types, missing = _types(kind), dataclasses.MISSING
    required = frozenset(f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is missing)
    if "" in types.values():
        parser.add_argument(
            "--config",
            action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
            help="YAML file of settings; flags after it win",
        )
        parser.epilog = f"--recipe NAME stands for the --config of a shipped recipe: {', '.join(recipes())}"
        arguments = _with_files(arguments, types, required)
    parser.add_class_arguments(kind)
    return _parsed(parser, kind, _spelt(arguments, positional, types, parser))


def _types(kind: type, prefix: str = "") -> dict[str, str]:
    """The type of every setting by its dotted name; empty for a group."""
    types: dict[str, str] = {}
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        group = hints[field.name]
        if isinstance(group, type) and dataclasses.is_dataclass(group):
            types |= {prefix + field.name: "", **_types(group, f"{prefix}{field.name}.")}
        else:
            types[prefix + field.name] = str(field.type)
    return types


def _parsed(parser: Any, kind: type, arguments: list[str]) -> Any:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(_explain(str(error), known)) from None
    except (UnicodeError, RecursionError) as error:  # of a value that is read as YAML
        raise InputError(f"a setting cannot be read ({str(error)[:200]}); see --help") from None
    except SystemExit as end:
        if end.code == 0:
            return None
        raise InputError("bad usage: see --help") from None
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(values)
    return _at_home(kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)}))


def _at_home(settings: Any) -> Any:
    """The settings with ``~`` at the beginning of their paths replaced by the home folder, also after ``NAME=``.

    Every text is looked at, for no setting but a path begins like one; URLs do not.
    """
    if isinstance(settings, str):
        if (match := _HOME.fullmatch(settings)) is None:
            return settings
        name, path = match.groups(default="")
        return name + os.path.expanduser(path)  # noqa: PTH111 - pathlib's fails where there is no such user
    if isinstance(settings, tuple):
        return tuple(_at_home(item) for item in settings)
    if not dataclasses.is_dataclass(settings):
        return settings
    held = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    changed = {name: new for name, value in held.items() if (new := _at_home(value)) != value}
    return dataclasses.replace(settings, **changed) if changed else settings  # type: ignore[type-var]


def _underscored(arguments: list[str]) -> list[str]:
    """``--if-better`` is ``--if_better``."""
    parts = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    return [f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" for name, equals, value in parts]


def _spelt(arguments: list[str], positional: tuple[str, ...], types: Mapping[str, str], parser: Any) -> list[str]:
    """Arguments as the parser takes them: a flag's name and one word.

    Words that are no flag's value are, wherever they stand, the settings that the verb lists as positional. A tuple
    takes words up to the next flag, as one JSON word: ``--labels 0.01 0.1``; a lone ``--json`` is ``--json true``.
    """
    alone = {option for action in parser._actions if action.nargs in (0, "?") for option in action.option_strings}
    names, rest = list(positional), _underscored(arguments)
    if positional:
        shown = [f"{name.upper()} ..." if "tuple" in types[name] else name.upper() for name in positional]
        parser.usage = f"{parser.prog} {' '.join(shown)} [--setting VALUE ...]"
    spelt: list[str] = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if not names:
                spelt.append(word)
                continue
            rest.insert(0, word)
            word = f"--{names.pop(0)}"
        name, equals, value = word.partition("=")
        wanted = types.get(name[2:], "")
        if equals:
            spelt.append(f"{name}={_null(wanted, value)}")
        else:
            spelt += [name, *(_value(wanted, rest) if name not in alone else [])]
    return spelt


def _value(wanted: str, rest: list[str]) -> list[str]:
    """The words after a flag of the type ``wanted`` that belong to it."""
    if wanted == "bool" and (not rest or rest[0].lower() not in ("true", "false")):
        return ["true"]
    if "tuple" not in wanted:
        return [_null(wanted, rest.pop(0))] if rest and not rest[0].startswith("--") else []
    items: list[str] = []
    while rest and not rest[0].startswith("--"):
        items.append(rest.pop(0))
    return [_joined(wanted, items)]


def _joined(wanted: str, items: list[str]) -> str:
    """The words of a tuple's flag as one."""
    if len(items) == 1 and (items[0].startswith("[") or _is_none(wanted, items[0])):
        return _null(wanted, items[0])
    # quoted, or a version's number would not pass for a word
    return f"[{', '.join(json.dumps(item) if 'str' in wanted else item for item in items)}]"


def _is_none(wanted: str, word: str) -> bool:
    """True for a word that leaves its setting open."""
    return wanted.endswith("| None") and word.lower() in (_NONE, "null")


def _null(wanted: str, word: str) -> str:
    """A word as the parser takes it: none (or null) for a setting that may be left open, and ~ for no such thing."""
    if _is_none(wanted, word):
        return "null"
    return str(Path.home()) if word == "~" and "str" in wanted else word


def _explain(message: str, known: list[str]) -> str:
    """A parser's complaint in one line, with the nearest spelling of an unknown key."""
    message = " ".join(message.split())
    unknown = re.search(r"unrecognized arguments: --([\w.]+)", message) or re.search(r"option '([\w.]+)'", message)
    group = re.search(r"Group '([\w.]+)'", message)
    if unknown is None:
        return message
    key = f"{group.group(1)}.{unknown.group(1)}" if group else unknown.group(1)
    return f"unknown setting {key}: {nearest(key, [option[2:] for option in known])}"


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml") if not path.stem.startswith(_STUDY))


def find_study(name: str) -> Path:
    """The file of a study: a path, or a shipped one's name.

    Raises:
        InputError: there is none.
    """
    shipped = {path.stem: path for path in _RECIPES.glob(f"{_STUDY}*.yaml")}
    path = Path(name).expanduser()
    if path.exists() or name not in shipped:
        if not path.is_file():
            raise InputError(f"file {name!r} is not there; give a YAML file, or a shipped study: {', '.join(shipped)}")
        return path
    return shipped[name]


def _with_files(arguments: list[str], types: Mapping[str, str], required: frozenset[str]) -> list[str]:
    """``--config FILE``, ``--recipe NAME`` (a shipped file) and ``--GROUP FILE`` as the flags that they mean."""
    replaced: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, path = argument.partition("=")
        group = option[2:] if types.get(option[2:]) == "" else ""
        if option not in ("--config", "--recipe") and not group:
            replaced.append(argument)
            continue
        path = path if equals else next(rest, "")
        if option == "--recipe":
            if path not in recipes():
                raise InputError(f"no recipe {path!r}: {nearest(path, recipes())}")
            path = str(_RECIPES / f"{path}.yaml")
        for name, words in read_flags(path, types, required, group):
            if name in MAY_NAME_CODE and (code := [word for word in words if names_code(word)]):
                raise InputError(f"config {path!r}: {name} names code; do so on the command line, --{name} {code[0]}")
            value = _joined(types[name], words) if "tuple" in types[name] else words[0]
            replaced.append(f"--{name}={value}")
    return replaced
