"""Returning freed memory of the host to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_LARGE = 1 << 20


def return_freed_memory() -> None:
    """Make glibc return what is freed, and from now on large blocks at once. Other C libraries are left as they are.

    By itself it keeps freed blocks of up to 32 MB once the program has used such: a network whose weights are gathered
    and freed block by block would in the end hold most of them.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        library.malloc_trim(0)
