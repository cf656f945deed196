"""The folder of a job: whose it is, and who works in it; and a scheduler's signal, between and inside its steps."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ca2cl.data.atomic import write_atomic, writing
from ca2cl.errors import InputError
from ca2cl.training.preempt import StopFlag

logger = logging.getLogger(__name__)
RECORD = "reproduce.json"
REMEDY = "give a folder you can write"


class Preempted(BaseException):
    """A signal asked for an end. Not an Exception: nobody is to take it for an error of theirs."""


class Preemption(StopFlag):
    """Ends whatever runs at the first signal, by ``Preempted``: for steps that lose little to a kill."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.raised
        super()._on_signal(number, frame)
        if first:
            raise Preempted


def read_record(out: Path) -> dict[str, Any] | None:
    """What the folder is the folder of, or None where it is nobody's.

    Raises:
        InputError: the record is damaged.
    """
    path = out / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {"digest": record["digest"], "settings": dict(record["settings"])}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); use another output_dir") from None


def differing(out: Path, settings: Mapping[str, Any]) -> list[str] | None:
    """In which settings the job that the folder belongs to differs from this one; None where it is nobody's.

    Raises:
        InputError: the record is damaged, or the folder holds something else.
    """
    record = read_record(out)
    if record is not None:
        return [name for name in settings if record["settings"].get(name) != settings[name]]
    if out.exists() and (not out.is_dir() or any(not entry.name.startswith(".") for entry in out.iterdir())):
        raise InputError(f"output_dir {str(out)!r} is not empty and holds no such job: use another folder")
    return None


def check_claim(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder is this job's already; False where it is nobody's.

    Raises:
        InputError: it is another's, or holds something else.
    """
    changed = differing(out, settings)
    if changed:
        raise InputError(f"output_dir {str(out)!r} holds another job ({', '.join(changed)} differ): use another folder")
    return changed is not None


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder this job's, and clear away what a killed start of it left half-written.

    Raises:
        InputError: it is another's, or cannot be written.
    """
    if not check_claim(out, settings):
        digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
        record = {"digest": digest, "settings": dict(settings)}
        write_atomic(out / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    for leftover in [*out.glob(".*.tmp-*"), *out.glob("linear/.*.tmp-*")]:
        with writing(leftover, REMEDY):
            leftover.unlink(missing_ok=True)
