"""Registry of self-supervised methods.

``method.name`` is a name of ``METHODS``, one that an installed package registers in the group ``ca2cl.methods`` of
entry points, or ``package.module:Class`` for a class that Python can import. The last runs any code, so a configuration
file cannot say it (``cli.parser``): only whoever starts the job can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from ca2cl.common.plugins import find_installed, installed, is_plugin, load_plugin
from ca2cl.errors import InputError, nearest
from ca2cl.methods.base import Method, MethodSettings

DEFAULT = "ca2cl"
"""Method of runs recorded before there was a choice."""
METHODS = {
    "ca2cl": "ca2cl.methods.ca2cl.method:CA2CL",
    "simclr": "ca2cl.methods.simclr:SimCLR",
    "distill": "ca2cl.methods.distill.method:Distill",
}


GROUP = "ca2cl.methods"
"""Group of entry points by which installed packages name methods."""


def find_method(name: str) -> type[Method]:
    """The class of the method ``name``.

    Raises:
        InputError: the name is unknown, or not a ``Method``.
    """
    found = find_installed(GROUP, name, "method.name", METHODS)
    path = found.path if found else METHODS.get(name, name)
    if not is_plugin(path):
        names = [*METHODS, *(one.name for one in installed(GROUP))]
        raise InputError(f"method.name is {name!r}: {nearest(name, names)}; your own is package.module:Class")
    kind = load_plugin(path, "method.name")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise InputError(f"method.name is {name!r}: not a subclass of ca2cl.methods.base.Method")
    return kind


def known_method(name: str) -> type[Method]:
    """The class of a built-in method or of an installed package's, ``Method`` itself for any other name.

    For names read from files: no module is imported because a file names it.
    """
    return find_method(name) if name in METHODS or find_installed(GROUP, name, "method.name") else Method


def build_method(name: str, settings: MethodSettings, options: Sequence[str] = ()) -> Method:
    """The method ``name`` with its settings.

    Args:
        name: as ``find_method`` takes it.
        settings: the shared ones.
        options: its own, ``NAME=VALUE`` each.

    Raises:
        InputError: the name is unknown, or the method refuses its settings.
    """
    kind = find_method(name)
    return kind.from_settings(replace(settings, options=_read_options(options, kind.options)))


def _read_options(words: Sequence[str], kind: type) -> Any:
    known = {option.name: type(option.default) for option in fields(kind)}
    values = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in known:
            raise InputError(f"method.options has {name!r}: {nearest(name, [*known])}")
        values[name] = _value(name, text, known[name])
    return kind(**values)


def _value(name: str, text: str, kind: type) -> Any:
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise InputError(f"method.options has {name} = {text!r}: give a value of type {kind.__name__}") from None
