"""Signals that ask for a checkpoint and a clean end.

SIGTERM, SIGUSR1, a lost terminal, and Ctrl-C while a job trains. A second one ends at once.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

from ca2cl.runtime.deadline import Deadline
from ca2cl.runtime.launched import launched_rank
from ca2cl.runtime.lifetime import is_running, when_launcher_ends

logger = logging.getLogger(__name__)
Flag = TypeVar("Flag", bound="StopFlag")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_SAME_SIGNAL_S, _SAME_CTRL_C_S = 2.0, 1.0
"""Seconds in which a second signal is the first one again: schedulers and terminals signal every process of a job, and
a launcher passes its own on."""
_JOIN_S = 20.0
"""Seconds after a signal that a process goes on waiting for others which have not started."""
_FIRST_STEP_S = 20.0
"""Seconds after a scheduler's signal that the first step of a start may go on: a job that is stopped early each time
would never end otherwise."""
_LINE_S = 2.0
"""Seconds that the last line of a process may take."""
EXIT_PREEMPTED = 85
"""Exit code that tells a scheduler to start the job again."""
EXIT_INTERRUPTED = 130
"""Exit code after Ctrl-C, as in a shell: a person stopped the job, and no scheduler is to start it again."""
LAUNCHER = "CA2CL_LAUNCHER"
"""Set in the environment of the processes that ``ca2cl launch`` starts."""


class GivenUp(BaseException):
    """Leaves a wait or a step that a signal ended. Not an ``Exception``: no handler may take it for a fault."""


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when a launcher that started it is gone.

    A launcher that is killed leaves its processes behind: they would train on, and block the next start. A process that
    cannot react, as in a collective whose other side has stopped, ends by its ``Deadline``.
    """

    def gone() -> None:
        held = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(held, StopFlag):
            held.launcher_gone()
        if not (isinstance(held, StopFlag) and held.signalled):
            os.kill(os.getpid(), signal.SIGTERM)

    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and not is_running(int(launcher)):  # gone before it was looked for
        gone()
    else:
        when_launcher_ends(gone)


class StopFlag:
    """Set by the first signal, read by the loop every step on every rank.

    A flag that only one place checks saved 0 of 6 preempted runs elsewhere (goodfire-ai/spd#740).

    Attributes:
        raised: a signal asked for an end, of this process or, after a step, of any.
        interrupted: it was Ctrl-C. Outside of ``training`` that raises KeyboardInterrupt instead: there is nothing to
            keep, and a person does not want to wait for it.
    """

    promise = "stopping after this step with a checkpoint"

    def __init__(self) -> None:
        self.raised = self.interrupted = False
        self._over = self._joining = self._trains = False
        self._since: float | None = None
        self._waits: bool | None = None
        self._received: tuple[int, float] | None = None
        self._deadline = Deadline()

    def install(self: Flag) -> Flag:
        """Take over the signals of this process (main thread only), but for those that it was started to ignore: by
        nohup, or in the background of a script.

        Returns:
            The flag of this kind that has them already, or else this one: a job that was signalled while it was still
            importing knows it.
        """
        held = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if type(held) is type(self):
            return held
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        self._watch()
        return self

    @property
    def exit_code(self) -> int:
        """Exit code of a job that was stopped."""
        return EXIT_INTERRUPTED if self.interrupted else EXIT_PREEMPTED

    @property
    def signalled(self) -> bool:
        """True if a signal has come, even if Python has not run its handler yet."""
        return self._received is not None

    @contextmanager
    def training(self) -> Iterator[None]:
        """Context of a training: Ctrl-C then asks for a checkpoint, as the other signals do."""
        before, self._trains = self._trains, True
        self._deadline.resume()
        try:
            yield
        finally:
            self._trains = before
            self._deadline.suspend()

    @contextmanager
    def unhurried(self) -> Iterator[None]:
        """Context without the deadline, for what may take long in a training: a checkpoint, figures."""
        self._deadline.suspend()
        try:
            yield
        finally:
            self._deadline.resume()

    @contextmanager
    def waiting(self, *, first: bool) -> Iterator[None]:
        """Context of a wait for a step's data, which a signal may end.

        Args:
            first: it is the first step of this start.

        Raises:
            GivenUp: at the signal that ends the wait.
        """
        if self.overdue(first=first):
            raise GivenUp
        self._waits = first
        try:
            yield
        finally:
            self._waits = None

    def overdue(self, *, first: bool) -> bool:
        """True if training has to end without the step that is under way. Every step calls it, which also feeds the
        deadline."""
        self._deadline.check()
        if not self.raised or self.interrupted:
            return self.interrupted
        return not first or time.monotonic() - (self._since or time.monotonic()) > _FIRST_STEP_S

    @contextmanager
    def joining(self) -> Iterator[None]:
        """Context in which processes wait for each other to start. Where that lasts for 20 s after a signal (a host
        never came), the process ends: no work is lost yet."""
        self._joining = True
        try:
            yield
        finally:
            self._joining = False

    def over(self) -> None:
        """Ignore signals from now on: the job is done, and the process ends. A launcher sends SIGTERM to the other
        processes as soon as one has ended, and their exit code must stay the same."""
        self._over = True

    def launcher_gone(self) -> None:
        """Start the deadline: no launcher is left to end this process. After Ctrl-C torch's launcher waits for its
        processes, unless it was pressed again. accelerate's launcher of one process does not, and by then the terminal
        belongs to the shell again."""
        self._deadline.begin()
        if self._received is None or self._received[0] != signal.SIGINT:
            return
        if "TORCHELASTIC_RUN_ID" in os.environ:
            os._exit(EXIT_INTERRUPTED)
        if not self._over and self._trains and launched_rank() == 0:
            logger.warning("its launcher has ended, process %d has not yet; kill it to stop at once", os.getpid())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._over:
            return
        if number == signal.SIGINT and not self._trains:
            raise KeyboardInterrupt
        self.raised = True
        self.interrupted |= number == signal.SIGINT
        self._since = self._since or time.monotonic()
        if self._waits is not None and self.overdue(first=self._waits):
            self._waits = None  # once: what is left in between has to close its files and workers
            raise GivenUp

    def _watch(self) -> None:
        """Count signals in a thread: Python's own handlers wait as long as the main thread is inside of C, in a
        backward pass or a collective whose other side is gone."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_unwatch)  # workers' signals are their own
        threading.Thread(target=self._count, args=(reader, writer), name="ca2cl-signals", daemon=True).start()

    def _count(self, reader: socket.socket, _writer: socket.socket) -> None:
        reader.settimeout(1.0)
        while True:
            number = None
            with suppress(TimeoutError):
                number = reader.recv(1)
            if self._joining and self._received is not None and time.monotonic() - self._received[1] > _JOIN_S:
                self._end()
            if self._deadline.passed() and not self._over:
                threading.Timer(_LINE_S, self._end).start()  # even if nobody reads the line
                logger.warning(
                    "rank %d: its launcher has ended, and it is held up itself, by a rank that does not answer or by "
                    "its data: it ends without another checkpoint; start again to go on", launched_rank(),
                )  # fmt: skip
                self._end()
            if number is not None and number[0] in _SIGNALS and not self._over:
                self._receive(number[0])

    def _end(self) -> None:
        of_ctrl_c = self._received is not None and self._received[0] == signal.SIGINT
        os._exit(EXIT_INTERRUPTED if of_ctrl_c else EXIT_PREEMPTED)

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if self._received is None:
            self._received = number, now
            if self._trains or number != signal.SIGINT:
                again = "Ctrl-C again" if number == signal.SIGINT else f"{signal.Signals(number).name} again"
                _say(f"{self.promise}; {again} to stop at once")
        elif now - self._received[1] > (_SAME_CTRL_C_S if number == signal.SIGINT else _SAME_SIGNAL_S):
            _say("stopped at once")
            os._exit(128 + number)


def _say(line: str) -> None:
    if launched_rank() == 0:  # one line for the job
        logger.warning(line)


def _unwatch() -> None:
    with suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)
