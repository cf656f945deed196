"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean end; a second one, later than two seconds after
it, ends at once."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

Flag = TypeVar("Flag", bound="StopFlag")
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_SAME_SIGNAL_S = 2.0
_JOIN_S = 20.0
"""Seconds after a signal that a process goes on waiting for others which have not started."""
EXIT_PREEMPTED = 85
"""Exit code that tells a scheduler to start the job again."""


_PR_SET_PDEATHSIG = 1
LAUNCHER = "CA2CL_LAUNCHER"
"""Set in the environment of the processes that ``ca2cl launch`` starts."""


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when the launcher that started it is gone.

    A launcher that is killed takes nobody along: its processes have sessions of their own, would train on, and be in
    the way of the next start.
    """
    if LAUNCHER not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    with suppress(OSError, AttributeError):  # no Linux
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    try:
        os.kill(int(os.environ.get(LAUNCHER, os.getppid())), 0)
    except ProcessLookupError:  # gone before this was asked for
        os.kill(os.getpid(), signal.SIGTERM)


class StopFlag:
    """Set by the first signal, read by the loop every step on every rank.

    A flag that only one place checks saved 0 of 6 preempted runs elsewhere (goodfire-ai/spd#740).
    """

    def __init__(self) -> None:
        self.raised = False
        self._over = self._joining = False

    def install(self: Flag) -> Flag:
        """Take over SIGTERM and SIGUSR1 of this process (main thread only).

        Returns:
            The flag of this kind that has them already, or else this one: a job that was signalled while it was still
            importing knows it.
        """
        held = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if type(held) is type(self):
            return held
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)
        self._watch()
        return self

    @contextmanager
    def joining(self) -> Iterator[None]:
        """While processes wait for each other to start. Where that lasts for 20 s after a signal (a host that never
        came), the process ends with 85: nothing has been done yet."""
        self._joining = True
        try:
            yield
        finally:
            self._joining = False

    def over(self) -> None:
        """The job is done, what follows is the end of the process: signals change nothing any more. A launcher sends
        SIGTERM to the other processes as soon as one has ended, and they have the same exit code to tell."""
        self._over = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.raised = True

    def _watch(self) -> None:
        """Count signals in a thread: Python's own handlers wait as long as the main thread is inside of C, in a
        backward pass or a collective whose other side is gone."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_unwatch)  # workers' signals are their own
        threading.Thread(target=self._count, args=(reader, writer), name="ca2cl-signals", daemon=True).start()

    def _count(self, reader: socket.socket, _writer: socket.socket) -> None:
        first = None
        reader.settimeout(1.0)
        while True:
            number = None
            with suppress(TimeoutError):
                number = reader.recv(1)
            now = time.monotonic()
            if self._joining and first is not None and now - first > _JOIN_S:
                os._exit(EXIT_PREEMPTED)
            if number is None or number[0] not in _SIGNALS or self._over:
                continue
            first = first or now
            # A scheduler signals every process and the launcher passes it on: the same, twice within milliseconds.
            if now - first > _SAME_SIGNAL_S:
                os._exit(128 + number[0])


def _unwatch() -> None:
    with suppress(ValueError):  # forked by another thread
        signal.set_wakeup_fd(-1)
