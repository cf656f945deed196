"""Compile loops over pixels, once a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """The function in machine code, made at its first call and kept in Numba's cache; it lets other threads run.

    The cache looks at the function's own file only: compiled code calls nothing of another file, and takes from there
    no number that may change. Float32 throughout (a bare number would be a double), no branch within the innermost
    loop, no index that might be negative: then the compiler uses vector instructions.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": {"nnan", "ninf", "nsz", "contract"}}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that a cache may be written to: compiled once a process
        return njit(**options)(function)
