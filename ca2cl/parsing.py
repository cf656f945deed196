"""A verb's settings from the command line and YAML files: a parser made of the settings' dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

from ca2cl.errors import InputError, nearest
from ca2cl.verbs import VERBS

_RECIPES = Path(__file__).parent / "recipes"


def parse(name: str, arguments: list[str]) -> Any:
    """The settings object of verb ``name``, or None when only help or the resolved configuration was asked for.

    Raises:
        InputError: the arguments do not fit the verb's settings.
    """
    import jsonargparse

    verb = VERBS[name]
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    module = importlib.import_module(verb.settings_module or verb.module)
    kind = getattr(module, verb.settings)
    positional: tuple[str, ...] = getattr(module, "POSITIONAL", ())
    parser = jsonargparse.ArgumentParser(prog=f"ca2cl {name}", description=kind.__doc__, exit_on_error=False)
    grouped = any(dataclasses.is_dataclass(field.default_factory) for field in dataclasses.fields(kind))
    if grouped:
        parser.add_argument(
            "--config",
            action=jsonargparse.ActionConfigFile,  # type: ignore[attr-defined]
            help="YAML file of settings; flags after it win",
        )
        parser.epilog = f"--recipe NAME stands for the --config of a shipped recipe: {', '.join(recipes())}"
        arguments = _with_recipe(arguments)
    parser.add_class_arguments(kind)
    return _parsed(parser, kind, _spelt(arguments, positional, kind, parser))


def _parsed(parser: Any, kind: type, arguments: list[str]) -> Any:
    known = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise InputError(_explain(str(error), known)) from None
    except (UnicodeError, RecursionError, OSError) as error:  # what its reader of YAML lets through
        raise InputError(f"config cannot be read ({str(error)[:200]}); give a file of YAML") from None
    except SystemExit as end:
        if end.code == 0:
            return None
        raise InputError("bad usage: see --help") from None
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(values)
    return kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)})


def _underscored(arguments: list[str]) -> list[str]:
    """``--if-better`` is ``--if_better``."""
    parts = [argument.partition("=") if argument.startswith("--") else ("", "", argument) for argument in arguments]
    return [f"{name[:2]}{name[2:].replace('-', '_')}{equals}{value}" for name, equals, value in parts]


def _spelt(arguments: list[str], positional: tuple[str, ...], kind: type, parser: Any) -> list[str]:
    """Arguments as the parser takes them: a flag's name and one word.

    Words that are no flag's value are, wherever they stand, the settings that the verb lists as positional. A tuple
    takes words up to the next flag, as one JSON word: ``--labels 0.01 0.1``; a lone ``--json`` is ``--json true``.
    """
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
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
        spelt.append(word)
        if "=" not in word and word not in alone:
            spelt += _value(types.get(word[2:], ""), rest)
    return spelt


def _value(wanted: str, rest: list[str]) -> list[str]:
    """What a flag of the type ``wanted`` takes of the words after it."""
    if wanted == "bool" and (not rest or rest[0].lower() not in ("true", "false")):
        return ["true"]
    if "tuple" not in wanted:
        return [rest.pop(0)] if rest else []
    items: list[str] = []
    while rest and not rest[0].startswith("--"):
        items.append(rest.pop(0))
    if len(items) == 1 and items[0].startswith("["):
        return items
    # quoted, or a version's number would not pass for a word
    return [f"[{', '.join(json.dumps(item) if 'str' in wanted else item for item in items)}]"]


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
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def _with_recipe(arguments: list[str]) -> list[str]:
    """``--recipe NAME`` is ``--config`` of a shipped file."""
    replaced: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument != "--recipe" and not argument.startswith("--recipe="):
            replaced.append(argument)
            continue
        name = argument.partition("=")[2] or next(rest, "")
        if name not in recipes():
            raise InputError(f"no recipe {name!r}: {nearest(name, recipes())}")
        replaced += ["--config", str(_RECIPES / f"{name}.yaml")]
    return replaced
