"""Run commands as child processes that get this process's signals."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Sequence
from subprocess import Popen
from types import FrameType

from ca2cl.common.console.summary import PART
from ca2cl.runtime.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED

logger = logging.getLogger(__name__)
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,  # the connection that the study was started through is gone
}


class Stopped(BaseException):
    """A signal asked for an end. Not an ``Exception``: no handler may take it for a fault.

    Attributes:
        code: exit code of the study.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Children:
    """Starts one child at a time and passes on signals to it. Between two children a signal raises ``Stopped``."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._child: Popen[bytes] | None = None
        self._busy = False

    def install(self) -> Children:
        """Take over the signals of this process, but for those that it was started to ignore."""
        for number in _PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._take)
        return self

    def run(self, command: Sequence[str]) -> int:
        """Run a command to its end and return its exit code; 128 + N if signal N ended it.

        Raises:
            Stopped: a signal came, to this process or, as a scheduler sends it, to the child alone.
        """
        self._busy = True  # from here on a signal is kept for the child
        self.check()
        self._child = Popen(command, env={**os.environ, PART: "1"})
        if self._received is not None:  # while it was started
            self._child.send_signal(self._received)
        code = self._child.wait()
        self._busy, self._child = False, None
        if code == 0:
            self.check()
            return 0
        if code == EXIT_PREEMPTED and self._received is None:
            raise Stopped(EXIT_PREEMPTED)
        self.check()
        return code if code > 0 else 128 - code

    def check(self) -> None:
        """Raise ``Stopped`` if a signal came."""
        if self._received is not None:
            raise Stopped(EXIT_INTERRUPTED if self._received == signal.SIGINT else EXIT_PREEMPTED)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        passed = _PASSED_ON[signal.Signals(number)]
        self._received = self._received or passed
        if self._child is not None:
            self._child.send_signal(passed)
        elif not self._busy:
            self.check()
