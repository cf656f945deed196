"""Time limit between stop-flag checks once the launcher is gone."""

from __future__ import annotations

import time

GRACE_S = 30.0


class Deadline:
    """Time limit of a process that hangs, such as inside of a collective whose other side has stopped.

    A check is due ``grace_s`` after the last one, or after the launcher's end if that was later; where checks are
    further apart by themselves, twice their longest distance so far. Ranks that still run write their checkpoint in
    that time, and a long step is not taken for one that hangs.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self._grace_s, self._longest = grace_s, 0.0
        self._checked: float | None = None
        self._begun: float | None = None
        self._suspended = False

    def begin(self) -> None:
        """Start the limit: the launcher is gone."""
        self._begun = self._begun or time.monotonic()

    def check(self) -> None:
        """Record that the process has come to a check."""
        now = time.monotonic()
        if self._checked is not None:
            self._longest = max(self._longest, now - self._checked)
        self._checked = now

    def passed(self) -> bool:
        """True if the check that is due has not come."""
        if self._begun is None or self._suspended:
            return False
        waited = time.monotonic() - max(self._begun, self._checked or 0.0)
        return waited > max(self._grace_s, 2 * self._longest)

    def suspend(self) -> None:
        """Pause the limit: a checkpoint is being written, or there is no training."""
        self._suspended = True

    def resume(self) -> None:
        """Go on, as if a check had come just now."""
        self._checked, self._suspended = time.monotonic(), False
