"""The folder of a job: whose it is, and who works in it; and a scheduler's signal, between and inside its steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from ca2cl.common.files import writing
from ca2cl.common.job_dir import JobFolder
from ca2cl.runtime.signals import StopFlag

logger = logging.getLogger(__name__)
RECORD = "reproduce.json"
REMEDY = "give a folder you can write"
KEPT = "free some space and start again: finished cells are kept"


class Preempted(BaseException):
    """A signal asked for an end. Not an Exception: nobody is to take it for an error of theirs."""


class Preemption(StopFlag):
    """Ends whatever runs at the first signal, by ``Preempted``: for steps that lose little to a kill."""

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first = not self.raised
        super()._on_signal(number, frame)
        if first:
            raise Preempted


def check_claim(out: Path, settings: Mapping[str, Any]) -> bool:
    """As ``JobFolder.check``."""
    return JobFolder(out, RECORD).check(settings)


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """As ``JobFolder.claim``, and clear away what a killed start left half-written.

    Raises:
        InputError: it is another's, or cannot be written.
    """
    JobFolder(out, RECORD).claim(settings)
    for leftover in [*out.glob(".*.tmp-*"), *out.glob("linear/.*.tmp-*")]:
        with writing(leftover, REMEDY):
            leftover.unlink(missing_ok=True)
