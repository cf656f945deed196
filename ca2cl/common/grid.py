"""Resumable grid of trials; one with a result file is done."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TypeVar

RESULT = "result.json"
AGAIN = "delete its folder and start again"
T = TypeVar("T")


class Grid(dict[T, Path]):
    """The trials of one job in order, each with the file of its result, which is written last.

    A trial is one training of the grid, such as an encoder, a label budget and a seed.
    """

    def missing(self) -> list[T]:
        """The trials that are not done."""
        return [trial for trial, path in self.items() if not path.exists()]


def folder_name(text: str) -> str:
    """``text`` as a part of a file's name: an encoder's path or address must not lead out of the job's folder, nor two
    of them to one name."""
    plain = re.sub(r"[^\w.@-]+", "-", text).lstrip(".-")
    return plain if plain == text else f"{plain[-60:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
