"""Read the YAML file of a study."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ca2cl.cli.parser import MAY_NAME_CODE, find_study, parse
from ca2cl.cli.yaml_files import read_tree
from ca2cl.common.plugins import names_code
from ca2cl.errors import InputError, nearest
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.study.config import StudyConfig

_KEYS = ("shards", "seeds", "minutes", "steps", "settings", "recipes", "probe")
_OURS = {
    "data.shards": "shards", "run.output_dir": "--output_dir", "run.seed": "seeds", "run.steps": "minutes or steps",
    "run.epochs": "minutes or steps", "run.resume": "--output_dir",
}  # fmt: skip
"""Settings of a run that the study decides, and what decides them."""
_NOT_PROBED = ("encoder", "against", "output", "protocol")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")


@dataclass(frozen=True)
class Study:
    """What a study's file and the command line ask for."""

    name: str
    seeds: int
    minutes: float | None
    """Training time of each run; None where ``steps`` says it."""
    steps: int | None
    recipes: dict[str, PretrainConfig]
    probe: ProbeConfig
    shards: str


def read_study(config: StudyConfig) -> Study:
    """The study that ``config.file`` describes, with the command line's shards.

    Raises:
        InputError: the file cannot be read, a key is unknown, or a value does not fit.
    """
    path = find_study(config.file)
    tree = read_tree(str(path))
    if unknown := [key for key in tree if key not in _KEYS]:
        raise InputError(f"study {config.file!r}: unknown setting {unknown[0]}: {nearest(unknown[0], _KEYS)}")
    where = f"study {config.file!r}"
    shards = config.shards or _word(tree, "shards", where)
    if not shards:
        raise InputError(f"{where}: shards is not set: give --shards FOLDER")
    recipes = _group(tree, "recipes", where)
    if not recipes:
        raise InputError(f"{where}: recipes is empty: give at least one, as NAME: {{recipe: crc5_small}}")
    shared = _group(tree, "settings", where)
    minutes, steps = _length(tree, where)
    return Study(
        name=path.stem,
        seeds=_whole(tree, "seeds", where, 1),
        minutes=minutes,
        steps=steps,
        recipes={name: _recipe(name, own, shared, where) for name, own in recipes.items()},
        probe=_probe(_group(tree, "probe", where), config, shards, where),
        shards=shards,
    )


def _recipe(name: str, own: Any, shared: Mapping[str, Any], where: str) -> PretrainConfig:
    where = f"{where}, recipe {name}"
    if not _NAME.fullmatch(name):
        raise InputError(f"{where}: a recipe's name becomes a folder; use letters, digits, . - and _")
    if not isinstance(own, dict):
        raise InputError(f"{where}: give settings by name, such as {{recipe: crc5_small}}")
    own = dict(own)
    base = own.pop("recipe", "")
    words = [*(["--recipe", base] if base else []), *_flags(shared, where), *_flags(own, where)]
    try:
        parsed: PretrainConfig = parse("pretrain", words)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return parsed


def _probe(own: Mapping[str, Any], config: StudyConfig, shards: str, where: str) -> ProbeConfig:
    for key in own:
        if key in _NOT_PROBED or key == "tracking":
            raise InputError(f"{where}: probe.{key} is the study's to decide; leave it out")
    tree = {"train": shards, "imagenet": "false", **own}
    tree |= {"train": config.train} if config.train else {}
    tree |= {"test": list(config.test)} if config.test else {}
    if not tree.get("test"):
        raise InputError(f"{where}: probe.test is not set: give --test FOLDER, shards of test tiles")
    tests = tree["test"]
    tree["test"] = tests if isinstance(tests, list) else [tests]
    try:
        parsed: ProbeConfig = parse("probe", ["--encoder", "random", *_flags(tree, where, decided={})])
    except InputError as error:
        raise InputError(f"{where}, probe: {error}") from None
    return parsed


def _flags(tree: Mapping[str, Any], where: str, prefix: str = "", decided: Mapping[str, str] = _OURS) -> Iterator[str]:
    """The settings of a tree as words of the command line."""
    for key, value in tree.items():
        name = prefix + key
        if name in decided or name == "tracking":
            by = decided.get(name, "--tracking.*")
            raise InputError(f"{where}: {name} is decided by {by} of the study; leave it out")
        if isinstance(value, dict):
            yield from _flags(value, where, f"{name}.", decided)
            continue
        words = value if isinstance(value, list) else [value]
        if name in MAY_NAME_CODE and any(map(names_code, words)):
            raise InputError(f"{where}: {name} names code, which no file may: install it as a package")
        yield from [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]


def _group(tree: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = tree.get(key, {})
    if value in ("null", ""):
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: {key} is {value!r}: give settings by name")
    return value


def _word(tree: Mapping[str, Any], key: str, where: str) -> str:
    value = tree.get(key, "")
    if not isinstance(value, str):
        raise InputError(f"{where}: {key} is {value!r}: give one value")
    return "" if value == "null" else value


def _whole(tree: Mapping[str, Any], key: str, where: str, default: int | None = None) -> Any:
    word = _word(tree, key, where)
    if not word:
        return default
    if not word.isdecimal() or int(word) < 1:
        raise InputError(f"{where}: {key} is {word!r}: use a whole number, 1 or more")
    return int(word)


def _length(tree: Mapping[str, Any], where: str) -> tuple[float | None, int | None]:
    """Minutes and steps of every run; one of them is None."""
    word, steps = _word(tree, "minutes", where), _whole(tree, "steps", where)
    if bool(word) == bool(steps):
        raise InputError(f"{where}: give either minutes, for equal time, or steps, for an equal number of them")
    if not word:
        return None, steps
    try:
        minutes = float(word)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise InputError(f"{where}: minutes is {word!r}: use a positive number")
    return minutes, None
