"""Parse a verb's settings from the command line and YAML files."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ca2cl.cli.complaints import explain
from ca2cl.cli.fields import groups_of
from ca2cl.cli.help import long_help, short_help
from ca2cl.cli.verbs import VERBS
from ca2cl.cli.yaml_files import read_flags
from ca2cl.common.plugins import names_code
from ca2cl.config import TrackingConfig, ViewsConfig
from ca2cl.errors import InputError, nearest

_RECIPES = Path(__file__).parent.parent / "recipes"
_STUDY = "study_"
"""What the names of shipped studies begin with; they are no recipes of one verb."""
_NONE = "none"
WITH_RECIPES = ("pretrain", "doctor plan")
"""Verbs whose settings the shipped recipes are of."""
_DOCTORS = {
    "views.recipe": "recipe",
    "views.strength": "strength",
    "views.crop_scale": "crop_scale",
    **{f"run.{name}": name for name in ("batch_size", "micro_batch_size", "accumulation")},
}
_DOCTORS |= {f"data.{name}": name for name in ("lanes", "workers", "image_size")}
_DOCTORS |= {f"model.{name}": name for name in ("arch", "norm", "norm_group", "norm_block")}
"""Settings of ``pretrain`` by those of ``doctor`` that they are named by."""
MAY_NAME_CODE = frozenset({"method.name", "model.arch", "tracking.sinks", "source"})
"""Settings whose value may be module:attribute: a file, which may come from elsewhere, must not run code."""
_STARTS_PROGRAMS = frozenset({"launcher"})
"""Settings whose words are a command: likewise, and whatever they are."""
_STORES = ("--tracking.uri", "--tracking.root", "--tracking_uri", "--tracking_root")
_RUNS = ("encoder", "run", "detector", "model.weights", "run.output_dir")
"""Settings that may be the path of a run, whose store is then the job's; no flag, file or environment names another."""
_EITHER = {"run.epochs": "run.steps", "run.steps": "run.epochs"}
"""Lengths of a run, of which it has one: a later one replaces the other where a file gave that."""
_HOME = re.compile(r"([^/~=]*=)?(~.*)", re.DOTALL)


def parse(name: str, arguments: list[str]) -> Any:
    """The settings object of verb ``name``, or None when only help or the resolved configuration was asked for.

    Raises:
        InputError: the arguments do not fit the verb's settings.
    """
    verb = VERBS[name]
    module = importlib.import_module(verb.settings_module)
    kind = getattr(module, verb.settings)
    positional: tuple[str, ...] = getattr(module, "POSITIONAL", ())
    types = _types(kind)
    files = "" in types.values()
    if text := _help(name, kind, positional, files, _underscored(arguments)):
        sys.stdout.write(text)
        return None
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=f"ca2cl {name}", exit_on_error=False, add_help=False, allow_abbrev=False)
    missing = dataclasses.MISSING
    required = frozenset(f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is missing)
    if name == "doctor":
        arguments = _planned(arguments)
    if files:
        parser.add_argument("--config", action=jsonargparse.ActionConfigFile)  # type: ignore[attr-defined]
        arguments = _with_files(arguments, types, required)
    parser.add_class_arguments(kind)
    words = _spelt(arguments, positional, types, parser)
    settings = _parsed(name, parser, kind, words, positional)
    return settings if any(word.startswith(_STORES) for word in words) else _with_store(name, settings)


def _help(name: str, kind: type, positional: tuple[str, ...], files: bool, arguments: list[str]) -> str:
    """The help that the arguments ask for; empty if they do not."""
    wanted = next((word for word in arguments if word in ("-h", "--help", "--help_all")), "")
    if not wanted:
        return ""
    groups, shipped = list(groups_of(kind)), recipes() if name in WITH_RECIPES else []
    if wanted == "--help_all":
        return long_help(name, groups, positional, shipped, files)
    return short_help(name, groups, positional, shipped)


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


def _parsed(name: str, parser: Any, kind: type, arguments: list[str], positional: tuple[str, ...]) -> Any:
    try:
        values = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        fields = {field.name: field for group in groups_of(kind) for field in group.fields}
        given = {word.partition("=")[0][2:] for word in arguments if word.startswith("--")}
        raise InputError(explain(str(error), name, fields, positional, given)) from None
    except (UnicodeError, RecursionError) as error:  # of a value that is read as YAML
        raise InputError(f"a setting cannot be read ({str(error)[:200]}); see --help") from None
    except SystemExit as end:
        if end.code == 0:
            return None
        raise InputError("bad usage: see --help") from None
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    built = instantiate(values)
    return _at_home(kind(**{field.name: built[field.name] for field in dataclasses.fields(kind)}))


def _with_store(verb: str, settings: Any) -> Any:
    """The settings with the store that they lead to, or the user's configuration, where they name none themselves."""
    group = getattr(settings, "tracking", None)
    if settings is None or not (group or hasattr(settings, "tracking_root")) or os.environ.get("MLFLOW_TRACKING_URI"):
        return settings
    from ca2cl.store.databases import database_of
    from ca2cl.store.locate import RUN_RECORD, place_of_paths, user_place

    names = (*_RUNS, "source") if verb == "encoders import" else _RUNS  # elsewhere a source is tiles
    values = {name: value for name in names if isinstance(value := _get(settings, name), str)}
    own = values.pop("run.output_dir", "") if verb == "pretrain" else values.get("run", "") if verb == "report" else ""
    if own and Path(own, RUN_RECORD).exists():  # these verbs read it themselves
        return settings
    place = place_of_paths(values.values())
    if place is None or (place.uri is not None and database_of(place.uri) is None):
        place = user_place()  # a folder that came from elsewhere must not send this user's results to a server
    here = Path(TrackingConfig.root).resolve()
    if place is None or (place.root is not None and Path(place.root).resolve() == here):
        return settings
    found = {name: value for name, value in place._asdict().items() if value is not None}
    if group is None:
        return dataclasses.replace(settings, **{f"tracking_{name}": value for name, value in found.items()})
    return dataclasses.replace(settings, tracking=dataclasses.replace(group, **found))


def _get(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = getattr(settings, part, None)
    return settings


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


def _planned(arguments: list[str]) -> list[str]:
    """``doctor --recipe NAME`` of a shipped recipe as the flags of the job that it plans."""
    pretrain = VERBS["pretrain"]
    kind = getattr(importlib.import_module(pretrain.settings_module), pretrain.settings)
    planned: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        option, equals, recipe = argument.partition("=")
        if option != "--recipe":
            planned.append(argument)
            continue
        recipe = recipe if equals else next(rest, "")
        views = typing.get_args(typing.get_type_hints(ViewsConfig)["recipe"])
        if recipe in views:
            planned.append(f"--recipe={recipe}")
        elif recipe in recipes():
            flags = read_flags(str(_RECIPES / f"{recipe}.yaml"), _types(kind), frozenset(), "")
            planned.append(f"--pretrain_recipe={recipe}")
            for name, words in flags:
                planned += [f"--{_DOCTORS[name]}", *words] if name in _DOCTORS else []
        else:
            raise InputError(f"recipe is {recipe!r}: {nearest(recipe, [*views, *recipes()])}")
    return planned


def _with_files(arguments: list[str], types: Mapping[str, str], required: frozenset[str]) -> list[str]:
    """``--config FILE``, ``--recipe NAME`` (a shipped file) and ``--GROUP FILE`` as the flags that they mean."""
    replaced: list[str] = []
    lengths: dict[str, int] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        option, equals, path = argument.partition("=")
        group = option[2:] if option.startswith("--") and types.get(option[2:]) == "" else ""
        if option not in ("--config", "--recipe") and not group:
            _replace_length(option, path if equals else "".join(rest[:1]), replaced, lengths)
            replaced.append(argument)
            continue
        path = path if equals else rest.pop(0) if rest else ""
        if option == "--recipe":
            if not path or path.startswith("-"):
                raise InputError(f"recipe has no value: give {', '.join(recipes())}")
            if path not in recipes():
                raise InputError(f"no recipe {path!r}: {nearest(path, recipes())}")
            path = str(_RECIPES / f"{path}.yaml")
        elif not path or path.startswith("-"):
            raise InputError(f"{option[2:]} has no value: give a file of YAML")
        elif group and Path(path).expanduser().is_dir():
            inside = [f"--{name}" for name in types if name.startswith(f"{group}.")][:3]
            raise InputError(
                f"{group} is {path!r}, a folder: give a YAML file, or single settings: {', '.join(inside)}"
            )
        flags = list(_flags_of(path, types, required, group))
        for flag in flags:
            name, _, value = flag.partition("=")
            _replace_length(name, value, replaced, lengths)
        lengths |= {flag[2:].partition("=")[0]: len(replaced) + number for number, flag in enumerate(flags)}
        replaced += flags
    return replaced


def _replace_length(option: str, value: str, replaced: list[str], lengths: dict[str, int]) -> None:
    """Leave open the epochs that a file gave where steps are given now, and the other way round.

    Args:
        option: that is given now.
        value: its word.
        replaced: the flags so far.
        lengths: where in them the settings of files stand, by name.
    """
    other = _EITHER.get(option[2:], "")
    if other in lengths and value.lower() not in (_NONE, "null"):
        replaced[lengths.pop(other)] = f"--{other}=null"


def _flags_of(path: str, types: Mapping[str, str], required: frozenset[str], group: str) -> Iterator[str]:
    """Yield the settings of a file as ``--NAME=VALUE``; one that would run code is refused."""
    for name, words in read_flags(path, types, required, group):
        if name in _STARTS_PROGRAMS:
            raise InputError(f"config {path!r}: {name} starts a program; give it on the command line, --{name}")
        if name in MAY_NAME_CODE and (code := [word for word in words if names_code(word)]):
            raise InputError(f"config {path!r}: {name} names code; do so on the command line, --{name} {code[0]}")
        value = _joined(types[name], words) if "tuple" in types[name] else words[0]
        yield f"--{name}={value}"
