"""The end of a verb: what was made, where, and what to do next."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ca2cl.common.redact import redact

PART = "CA2CL_PART"
"""Variable that is set where a verb is a part of a study or of the quickstart, which say themselves what comes next."""


def closing(made: str, where: object, *then: Sequence[object] | str) -> str:
    """The last lines of a verb; none within another verb's job.

    Args:
        made: what there is now, in a few words.
        where: the file or folder.
        then: commands to go on with, as words, and texts. A word in capital letters stands for the user's own.
    """
    if os.environ.get(PART):
        return ""
    return redact(f"\nmade  {made}\nin    {where}\n{_steps(then)}")


def going_on(*then: Sequence[object] | str) -> str:
    """The last lines of a verb that made nothing: see ``closing``."""
    return "" if os.environ.get(PART) else redact(f"\n{_steps(then)}")


@contextmanager
def as_part() -> Iterator[None]:
    """Within it, verbs end without these lines."""
    before = os.environ.get(PART)
    os.environ[PART] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PART]
        else:
            os.environ[PART] = before


def _steps(then: Sequence[Sequence[object] | str]) -> str:
    lines = [step if isinstance(step, str) else shlex.join(map(str, step)) for step in then]
    return "".join(f"{'' if number else 'next':4}  {line}\n" for number, line in enumerate(lines))
