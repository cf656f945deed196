"""Memory for views, used again from batch to batch."""

from __future__ import annotations

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt


class Spares:
    """Arrays whose memory is used again once nothing refers to them.

    Fresh memory costs a page fault every 4 kB, which was a quarter of a view's time. Memory is kept for as many arrays
    as were in use at once, until one of another size is asked for.
    """

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.uint8]] = []

    def array(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """An array that holds anything."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        spare = next((number for number, one in enumerate(self._free) if len(one) == size), None)
        if spare is None:
            self._free.clear()
        memory = np.empty(size, np.uint8) if spare is None else self._free.pop(spare)
        array = memory.view(dtype).reshape(shape)
        # A tensor made of it, and so every view of that, keeps this very array object alive.
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array
