"""The folder of a job that may be started again: which job's it is, written down in one file of it, and its lock."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ca2cl.data.atomic import alone, write_atomic
from ca2cl.errors import InputError
from ca2cl.untrusted import parse_json

_REMEDY = "give a folder you can write"
JOB_LOCK, LOCK_S = ".lock", 120.0
"""A job that is started again may find the one before still ending, or a file server that still holds its lock."""


def hold_job(folder: Path, held: ExitStack) -> str:
    """Keep other jobs out of a folder until the stack is closed; what is wrong, or nothing."""
    try:
        held.enter_context(alone(folder, JOB_LOCK, _REMEDY, LOCK_S))
    except InputError as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class JobFolder:
    """A folder, and the name of the file in it that says whose it is."""

    path: Path
    record: str

    def differing(self, settings: Mapping[str, Any]) -> list[str] | None:
        """In which settings the job that the folder belongs to differs from this one; None where it is nobody's.

        Raises:
            InputError: the record is damaged, or the folder holds something else.
        """
        held = self._held()
        if held is not None:
            return [name for name in settings if held.get(name) != settings[name]]
        out = self.path
        if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
            raise InputError(f"output_dir {str(out)!r} is not empty and holds no such job: use another folder")
        return None

    def check(self, settings: Mapping[str, Any]) -> bool:
        """Whether the folder is this job's already; False where it is nobody's.

        Raises:
            InputError: it is another's, or holds something else.
        """
        changed = self.differing(settings)
        if changed:
            raise InputError(
                f"output_dir {str(self.path)!r} holds another job ({', '.join(changed)} differ): use another folder"
            )
        return changed is not None

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
