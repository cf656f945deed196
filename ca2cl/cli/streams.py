"""Standard streams that cannot end a job.

A reader may leave, a disk fill up, a descriptor be closed, or an encoding lack a character.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
from contextlib import nullcontext
from typing import Any, TextIO

from ca2cl.common.redact import RedactingFormatter
from ca2cl.errors import InputError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class _Descriptor(io.FileIO):
    """A descriptor to write to, which after its first failure takes everything and writes nothing."""

    failed: int | None = None
    """Number of the first error."""

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        while self.failed is None:
            try:
                written = super().write(view)
            except OSError as error:
                self.failed = error.errno
            else:
                if written is not None:
                    return written
                select.select([], [self], [])  # another program made the terminal non-blocking
        return len(view)


def shield_streams() -> None:
    """Make printing safe for this process: what a job has done must not be lost over showing it.

    A reader that leaves (``| head``) or a terminal that is gone ends the output, not the job. A character that the
    stream's encoding lacks is written as its escape. Closed descriptors lead nowhere, and are no file's that is opened
    later. Streams that someone has put in the place of the process's own stay.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if sys.stdout is sys.__stdout__:
        sys.stdout = _shielded(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _shielded(sys.stderr, 2)


def _shielded(stream: TextIO | None, number: int) -> TextIO:
    if stream is not None:
        stream.flush()
    descriptor = _Descriptor(number, "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(descriptor),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=number == 2 or descriptor.isatty(),
        write_through=getattr(stream, "write_through", False),
    )


class Console(logging.StreamHandler[TextIO]):
    """Writes log lines without secrets to stderr, above a progress bar that is there."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(RedactingFormatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        bars = sys.modules.get("tqdm")
        with bars.tqdm.external_write_mode(self.stream, nolock=True) if bars else nullcontext():
            super().emit(record)


def check_output() -> None:
    """Write out what was printed.

    Raises:
        InputError: there was no room for it. Elsewhere nobody was there to read it, which is nobody's fault.
    """
    sys.stdout.flush()
    failed = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "failed", None)
    if failed in _FULL:
        raise InputError(f"stdout cannot be written ({os.strerror(failed)}); free space, or send it elsewhere")
