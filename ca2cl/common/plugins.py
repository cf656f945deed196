"""Extensions by dotted name or by an installed entry point.

``module:attribute`` is imported from the user's own Python path. Only names that a user gave on the command line or in
Python may come there: a file, which may be from elsewhere (YAML, a card, an index, a checkpoint), must never choose
what is imported. An installed package may give an extension a name of its own, by an entry point in a group such as
``ca2cl.methods``. Files may use such names, for they choose only among what the user has installed.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection
from importlib import metadata
from typing import Any, NamedTuple

from ca2cl.common.arch_names import OWN
from ca2cl.errors import InputError, nearest

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    """True if ``name`` has the form ``module:attribute`` and does not begin like a name of ca2cl's own."""
    return _NAME.fullmatch(name) is not None and not name.startswith(OWN)


def names_code(word: str) -> bool:
    """True if a setting's value is ``module:attribute``, or ``module:attribute:REST``."""
    return is_plugin(word) or is_plugin(word.rpartition(":")[0])


class Installed(NamedTuple):
    """An entry point: its name, ``module:attribute``, and the distribution that registers it."""

    name: str
    path: str
    package: str


def installed(group: str) -> list[Installed]:
    """Entry points of a group, such as ``ca2cl.methods``, in all installed packages; nothing is imported."""
    found = metadata.entry_points(group=group)
    return sorted({Installed(one.name, one.value, one.dist.name if one.dist else "?") for one in found})


def find_installed(group: str, name: str, setting: str, own: Collection[str] = ()) -> Installed | None:
    """The extension that an installed package registers as ``name``; None if there is none.

    Args:
        group: of entry points.
        name: to look up.
        setting: the setting that holds it, for the error.
        own: names of ca2cl's own, which no package may take.

    Raises:
        InputError: the name is of several packages, or one of ca2cl's own as well, or it stands for no attribute.
    """
    found = [one for one in installed(group) if one.name == name]
    packages = " and ".join([*(["ca2cl"] if name in own else []), *(one.package for one in found)])
    if found and (len(found) > 1 or name in own):
        raise InputError(
            f"{setting} is {name!r}: {packages} both have that name in {group}; uninstall one of them, or give "
            f"{found[0].path} on the command line"
        )
    if found and not is_plugin(found[0].path):
        raise InputError(f"{setting} is {name!r}: {packages} registers {found[0].path!r} for it, not module:attribute")
    return found[0] if found else None


def extension_path(group: str, name: str, setting: str) -> str:
    """``module:attribute`` of an extension that is named so, or by an installed package.

    Raises:
        InputError: neither.
    """
    if is_plugin(name):
        return name
    found = find_installed(group, name, setting)
    if found is None:
        known = [one.name for one in installed(group)]
        raise InputError(f"{setting} is {name!r}: {nearest(name, known)} from installed packages; give module:Class")
    return found.path


def load_plugin(name: str, setting: str) -> Any:
    """Import what ``module:attribute`` names.

    Args:
        name: such as ``my_package.bodies:tiny``.
        setting: the setting that holds it, for the error.

    Raises:
        InputError: no such module on the Python path, or no such attribute in it. An error inside the module passes as
            it is.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise InputError(
            f"{setting} is {name!r}: no module {error.name!r}; put its folder on PYTHONPATH, or install it"
        ) from None
    except AttributeError:
        raise InputError(f"{setting} is {name!r}: {module} has no {attribute!r}") from None
