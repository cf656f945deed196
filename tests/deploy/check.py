"""What the deploy tests expect and find, as a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors.torch import load_file

from tests.support.jobs import training_lines

PATIENCE = 900.0


class Check:
    """What was expected and what was found, line by line."""

    def __init__(self) -> None:
        self.lines: list[tuple[bool, str, str]] = []

    def that(self, what: str, holds: bool, found: object) -> None:
        self.lines.append((holds, what, str(found)))

    def table(self) -> int:
        """Print it; the exit code."""
        width = max(len(what) for _, what, _ in self.lines)
        for holds, what, found in self.lines:
            sys.stdout.write(f"{'ok   ' if holds else 'WRONG'}  {what:{width}}  {found}\n")
        return 0 if all(holds for holds, _, _ in self.lines) else 1


def until(what: str, seen: Callable[[], bool], patience: float = PATIENCE) -> None:
    """Wait for a callable to be true."""
    deadline = time.monotonic() + patience
    while not seen():
        if time.monotonic() > deadline:
            raise SystemExit(f"never saw that {what}")
        time.sleep(0.3)


def steps(run: Path) -> list[int]:
    with suppress(OSError):
        return [line["step"] for line in training_lines(run)]
    return []


def distance(run: Path, other: Path) -> float:
    """The largest difference between the weights of two runs' encoders."""
    mine, theirs = (load_file(one / "encoder" / "encoder.safetensors") for one in (run, other))
    return max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs)
