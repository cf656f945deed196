"""Resumable grid of trials: a trial whose result file is there is done."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from ca2cl.common.files import write_atomic
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError

RESULT = "result.json"


class Named(Protocol):
    """A trial: one training of a grid, such as an encoder, a label budget and a seed."""

    @property
    def name(self) -> str:
        """Name of its folder or file."""


T = TypeVar("T", bound=Named)


def folder_name(text: str) -> str:
    """``text`` as a part of a file's name: an encoder's path or address must not lead out of the job's folder, nor two
    of them to one name."""
    plain = re.sub(r"[^\w.@-]+", "-", text).lstrip(".-")
    return plain if plain == text else f"{plain[-60:]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def budget_name(described: str) -> str:
    """A label budget as ``describe_budget`` has it, as a part of a file's name."""
    return described.replace(" %", "pct").replace("/", "-per-")


@dataclass(frozen=True)
class Grid(Generic[T]):
    """The trials of one job, in order.

    Attributes:
        root: folder of the results.
        trials: all of them.
        pattern: path of a result below ``root``; ``{}`` is the trial's name.
    """

    root: Path
    trials: Sequence[T]
    pattern: str = f"{{}}/{RESULT}"

    def path(self, trial: T) -> Path:
        """File of a trial's result, which is written last."""
        return self.root / self.pattern.format(trial.name)

    def folder(self, trial: T) -> Path:
        """Folder of a trial that has one of its own."""
        return self.path(trial).parent

    def missing(self) -> list[T]:
        """The trials that are not done."""
        return [trial for trial in self.trials if not self.path(trial).exists()]

    def read(self, trial: T, needed: Sequence[str] = ()) -> dict[str, Any]:
        """A trial's result; see ``read_result``."""
        return read_result(self.path(trial), needed, "its folder" if self.pattern.endswith(RESULT) else "it")


def write_result(path: Path, result: Mapping[str, Any], remedy: str) -> None:
    """Write a trial's result, after all else that the trial leaves."""
    write_atomic(path, (json.dumps(result, indent=1) + "\n").encode(), remedy)


def read_result(path: Path, needed: Sequence[str] = (), remove: str = "its folder") -> dict[str, Any]:
    """The result in a file, which has the fields ``needed``.

    Raises:
        InputError: it is missing or damaged; the user is told to delete ``remove``.
    """
    try:
        result = dict(parse_json(path.read_text(encoding="utf-8")))
        return {**{name: result[name] for name in needed}, **result}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); delete {remove} and start again") from None
