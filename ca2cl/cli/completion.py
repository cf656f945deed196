"""``ca2cl completion``: completion of verbs, settings and choices for bash and zsh."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ca2cl.cli.fields import Field, choices, groups_of
from ca2cl.cli.parser import WITH_RECIPES, recipes
from ca2cl.cli.verbs import VERBS

POSITIONAL = ("shell",)
_FLAGS = ("--help", "--help_all")
_FILES = ("--config", "--print_config")
# zsh takes bash's functions by its own bashcompinit, so that both have the same script
_ZSH = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n"
_SCRIPT = """\
_ca2cl() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} verb=${{COMP_WORDS[1]}} words=
    case "$verb ${{COMP_WORDS[2]}}" in
        {pairs}) (( COMP_CWORD > 2 )) && verb="$verb ${{COMP_WORDS[2]}}";;
    esac
    if (( COMP_CWORD == 1 )); then
        words="{first} help --help --version"
    elif [[ "$word" == -* ]]; then
        case "$verb" in
{flags}
        esac
    else
        case "$verb $before" in
{values}
        esac
    fi
    COMPREPLY=( $(compgen -W "$words" -- "$word") )
}}
complete -o default -F _ca2cl ca2cl
"""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script that completes verbs, settings and their values in a shell.

    Files are completed where a setting takes one. The script holds all names, so that no program runs while you type.
    """

    shell: Literal["bash", "zsh"]
    """Shell that the script is for."""


def run(config: CompletionConfig) -> int:
    """Print the script. Returns the exit code."""
    sys.stdout.write((_ZSH if config.shell == "zsh" else "") + script())
    return 0


def script() -> str:
    """The script for bash."""
    seconds: dict[str, list[str]] = {}
    for name in VERBS:
        word, _, second = name.partition(" ")
        seconds.setdefault(word, []).extend([second] if second else [])
    flags, values = [], [f'"{word} {word}") words="{" ".join(after)}";;' for word, after in seconds.items() if after]
    for name, verb in VERBS.items():
        if not verb.raw:
            fields, positional = list(_fields(name)), _positional(name)
            files = any("." in field.name for field in fields)
            more = [*_FLAGS, *(_FILES if files else ()), *(["--recipe"] if name in WITH_RECIPES else [])]
            known = [f"--{field.name}" for field in fields]
            flags.append(f'"{name}") words="{" ".join(dict.fromkeys([*known, *more]))}";;')
            values += _values(name, fields)
            values += [
                f'"{name} {name.split()[-1]}") words="{" ".join(choices(field.hint))}";;'
                for field in fields
                if field.name in positional[:1] and choices(field.hint)
            ]
    indent = "\n            "
    return _SCRIPT.format(
        pairs=" | ".join(f'"{name}"' for name in VERBS if " " in name), first=" ".join(seconds),
        flags=indent[1:] + indent.join(flags), values=indent[1:] + indent.join(values),
    )  # fmt: skip


def _values(verb: str, fields: list[Field]) -> Iterator[str]:
    for field in fields:
        words = ["true", "false"] if field.hint is bool else choices(field.hint)
        if field.name == "recipe" and verb == "doctor":
            words = [*words, *recipes()]
        if words and not any(" " in word for word in words):
            yield f'"{verb} --{field.name}") words="{" ".join(words)}";;'
    if verb in WITH_RECIPES:
        yield f'"{verb} --recipe") words="{" ".join(recipes())}";;'


def _positional(name: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(importlib.import_module(VERBS[name].settings_module), "POSITIONAL", ())
    return found


def _fields(name: str) -> Iterator[Field]:
    verb = VERBS[name]
    kind = getattr(importlib.import_module(verb.settings_module), verb.settings)
    for group in groups_of(kind):
        yield from group.fields
