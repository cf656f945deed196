"""The folder of a job that may be started again: which job's it is, written down in one file of it, and its lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2cl.common.files import alone, write_atomic
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError

_REMEDY = "give a folder you can write"
_SHOWN = 4
JOB_LOCK, LOCK_S = ".lock", 120.0
"""A job that is started again may find the one before still ending, or a file server that still holds its lock."""


def hold_job(folder: Path, held: ExitStack) -> str:
    """Keep other jobs out of a folder until the stack is closed; what is wrong, or nothing."""
    try:
        held.enter_context(alone(folder, JOB_LOCK, _REMEDY, LOCK_S))
    except InputError as error:
        return str(error)
    return ""


def changed(first: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``name old -> new`` of every setting that a job has now and had otherwise. One that it did not have at first is
    of a newer version and has its default."""
    return [f"{name} {first[name]} -> {now[name]}" for name in now if name in first and first[name] != now[name]]


def listed(changes: Sequence[str]) -> str:
    """The first of many, and how many more there are."""
    more = f", and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
    return ", ".join(changes[:_SHOWN]) + more


def other_job(folder: Path, changes: Sequence[str]) -> str:
    """The line that refuses a folder in which another job has begun."""
    return f"output_dir {str(folder)!r} holds another job ({listed(changes)}): use those settings, or another folder"


@dataclass(frozen=True)
class JobFolder:
    """A folder, and the name of the file in it that says whose it is."""

    path: Path
    record: str

    def differing(self, settings: Mapping[str, Any]) -> list[str] | None:
        """``changed`` of the job that the folder belongs to and this one; None where it is nobody's.

        Raises:
            InputError: the record is damaged, or the folder holds something else.
        """
        held = self._held()
        if held is not None:
            return changed(held, settings)
        out = self.path
        if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
            raise InputError(f"output_dir {str(out)!r} is not empty and holds no such job: use another folder")
        return None

    def check(self, settings: Mapping[str, Any]) -> bool:
        """Whether the folder is this job's already; False where it is nobody's.

        Raises:
            InputError: it is another's, or holds something else.
        """
        changes = self.differing(settings)
        if changes:
            raise InputError(other_job(self.path, changes))
        return changes is not None

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Make the folder this job's.

        Raises:
            InputError: it is another's, or cannot be written.
        """
        if not self.check(settings):
            digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
            record = {"digest": digest, "settings": dict(settings)}
            write_atomic(self.path / self.record, (json.dumps(record, indent=1) + "\n").encode(), _REMEDY)

    def _held(self) -> dict[str, Any] | None:
        path = self.path / self.record
        try:
            return dict(parse_json(path.read_text(encoding="utf-8"))["settings"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged ({error!r}); use another output_dir") from None
