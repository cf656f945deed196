"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean end; a second one, later than two seconds after
it, ends at once."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

_SAME_SIGNAL_S = 2.0
EXIT_PREEMPTED = 85
"""Exit code that tells a scheduler to start the job again."""


class StopFlag:
    """Set by the first signal, read by the loop every step on every rank.

    A flag that only one place checks saved 0 of 6 preempted runs elsewhere (goodfire-ai/spd#740).
    """

    def __init__(self) -> None:
        self.raised = False
        self._since = 0.0

    def install(self) -> StopFlag:
        """Take over SIGTERM and SIGUSR1 of this process (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A scheduler signals every process and the launcher passes it on: the same signal, twice within milliseconds.
        if self.raised and time.monotonic() - self._since > _SAME_SIGNAL_S:
            os._exit(128 + number)
        if not self.raised:
            self.raised, self._since = True, time.monotonic()
