"""Extensions by dotted name: ``module:attribute`` from the user's own Python path.

Only names that a user gave on the command line or in Python may come here: a file, which may be from elsewhere (YAML, a
card, an index, a checkpoint), must never choose what is imported.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

from ca2cl.common.arch_names import OWN
from ca2cl.errors import InputError

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_plugin(name: str) -> bool:
    """True if ``name`` has the form ``module:attribute`` and does not begin like a name of ca2cl's own."""
    return _NAME.fullmatch(name) is not None and not name.startswith(OWN)


def names_code(word: str) -> bool:
    """True if a setting's value is ``module:attribute``, or ``module:attribute:REST``."""
    return is_plugin(word) or is_plugin(word.rpartition(":")[0])


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
