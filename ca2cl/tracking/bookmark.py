"""Offset up to which a journal has been sent.

It lies in a file beside the journal.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ca2cl.common.files import replacing
from ca2cl.common.records import is_whole, parse_json


class Bookmark:
    """Offset of the first byte of a journal that one tracker does not have yet.

    A journal that was rewritten since is noticed by the bytes before the offset, and sent from its beginning.

    Args:
        path: file of the bookmark.
        journal: the journal.
    """

    def __init__(self, path: Path, journal: Path) -> None:
        self._path, self._journal = path, journal

    def read(self, run_id: str) -> tuple[int, dict[str, Any]]:
        """The offset, and what else was written for this run; 0 and nothing where it belongs to another."""
        try:
            state = parse_json(self._path.read_text(encoding="utf-8"))
            if state["run_id"] != run_id:
                return 0, {}
            same = is_whole(state["offset"]) and state["tail"] == self._tail(state["offset"])
            return (state["offset"] if same else 0), dict(state)
        except (OSError, ValueError, KeyError, TypeError):
            return 0, {}

    def write(self, offset: int, run_id: str, **more: int) -> None:
        """Remember that all before ``offset`` was sent."""
        state = {"run_id": run_id, "offset": offset, "tail": self._tail(offset), **more}
        with replacing(self._path) as file:
            file.write(json.dumps(state).encode())

    def _tail(self, end: int) -> str:
        """Digest of the last bytes before ``end``."""
        with self._journal.open("rb") as file:
            start = max(0, end - 512)
            file.seek(start)
            return hashlib.sha256(file.read(end - start)).hexdigest()
