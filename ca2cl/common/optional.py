"""Import optional packages, with one error that says what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from ca2cl.errors import InputError


class MissingPackage(InputError):
    """A package that is needed here is not installed; the message says how to get it."""


def need(name: str, remedy: str) -> ModuleType:
    """The module ``name``.

    Raises:
        MissingPackage: it cannot be imported; ``remedy`` is the end of the message.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        reason = "is not installed" if absent else f"cannot be imported ({error})"
        raise MissingPackage(f"{package} {reason}; {remedy}") from None
