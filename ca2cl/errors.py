"""The error type for bad usage and input."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # a terminal's escape sequences, which programs put into their errors
_LONGEST = 1800
_NAMED = 12  # of the known words, when none is near


class InputError(ValueError):
    """Bad usage or bad input: the command line prints it as one line and exits with code 2.

    The message names the file, field or sample, its value, and the remedy. Libraries raise plain
    ``ValueError`` for faults of ours too, so those keep their traceback and exit code 1.

    The message is kept to one line of printable characters and of bounded length: it may quote a damaged file, or
    another program.
    """

    def __init__(self, message: str) -> None:
        line = " ".join(_COLOURS.sub("", message).split())
        line = "".join(character if character.isprintable() else "?" for character in line)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)


class LocalError(InputError):
    """An ``InputError`` that perhaps only one of a job's processes met, and which that one must therefore tell."""


def nearest(word: str, known: Sequence[str]) -> str:
    """The remedy for a misspelt ``word``: the nearest of ``known``, or what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    more = ", ..." if len(known) > _NAMED else ""
    return f"there are {', '.join(known[:_NAMED])}{more}" if known else "there are none"
