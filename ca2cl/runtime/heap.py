"""Returning freed memory of the host to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def return_freed_memory() -> None:
    """Make glibc return large blocks of memory as soon as they are freed. Other C libraries are left as they are.

    By itself it keeps freed blocks of up to 32 MB once the program has used such: a network whose weights are gathered
    and freed block by block would in the end hold most of them.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)
