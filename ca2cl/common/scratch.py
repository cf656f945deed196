"""Temporary folders, with an error that names a full or missing one."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ca2cl.errors import InputError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class NoScratch(InputError):
    """No temporary folder, or no room in it: later there may be."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, gone after the block.

    Raises:
        NoScratch: none can be made, or its disk is full.
    """
    try:
        made = tempfile.TemporaryDirectory()
    except OSError as error:
        where = os.environ.get("TMPDIR") or "/tmp"
        raise NoScratch(
            f"temporary folder {where}: cannot be written ({error.strerror or error}); set TMPDIR to one with room"
        ) from None
    with made as name:
        try:
            yield Path(name)
        except InputError:
            raise
        except Exception as error:
            if is_full(error, name):
                folder = Path(name).parent
                raise NoScratch(f"temporary folder {folder}: no space left; free some, or set TMPDIR") from None
            raise


def is_full(error: Exception, folder: str | Path) -> bool:
    """True if a write to ``folder`` failed because its disk is full; libraries hide that in errors of their own."""
    full = getattr(error, "errno", None) in _FULL or os.strerror(errno.ENOSPC) in str(error)
    written = getattr(error, "filename2", None) or getattr(error, "filename", None)  # a copy's source and its target
    return full and (written is None or str(folder) in str(written))
