"""Progress of a stage: a bar on a terminal, elsewhere lines."""

from __future__ import annotations

import io
import logging
import shutil
import sys
from typing import Any

from tqdm import tqdm

_log = logging.getLogger(__name__)
EVERY_S = 30.0
"""Seconds between two lines; a stage that is shorter has none."""
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}s, {rate_noinv_fmt}, {remaining} left{postfix}"


class _Lines(io.TextIOBase):
    """What a bar writes, as lines of the log."""

    def write(self, text: str, /) -> int:
        if line := " ".join(text.split()):
            _log.info("%s", line)
        return len(text)


class ProgressBar(tqdm):  # type: ignore[type-arg]  # tqdm takes no parameter when it runs
    """tqdm's bar where stderr is a terminal; elsewhere a line every ``EVERY_S`` seconds. Its arguments are tqdm's;
    ``disable=True`` shows neither."""

    def __init__(
        self, iterable: Any = None, *, unit: str = "step", disable: bool | None = None, **options: Any
    ) -> None:
        self._lines = not disable and not sys.stderr.isatty()
        if self._lines:
            every = {"mininterval": EVERY_S, "miniters": 1, "delay": EVERY_S, "leave": True}
            options |= {"file": _Lines(), "bar_format": _LINE, **every}
        elif shutil.get_terminal_size((0, 0)).columns:
            options["dynamic_ncols"] = True
        else:  # a terminal that does not say how wide it is, as a container's may be
            options |= {"ncols": 80, "nrows": 24}
        super().__init__(iterable, unit=f" {unit}" if self._lines else unit, disable=bool(disable), **options)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Set the text at the end, which waits for the next line where there is no bar."""
        super().set_postfix_str(s, refresh and not self._lines)
