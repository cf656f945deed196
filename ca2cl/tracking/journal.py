"""Journal of a run: one JSON object a line, mirrored by MLflow.

A training line has ``step`` and ``loss`` and no ``event``; every other line has an ``event`` and never a ``step``. A
``watch`` line has the step that it belongs to in ``in_step``.
"""

from __future__ import annotations

import io
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ca2cl.common.files import replacing
from ca2cl.common.records import NONFINITE, is_number, is_whole, json_line, parse_json
from ca2cl.errors import InputError

JOURNAL_NAME = "journal.jsonl"
WATCH = "watch"
"""Event of a line with measurements of the encoder."""
WATCH_PREFIX = "watch/"
"""Of the names of these."""
_NONFINITE_WORDS = ("nan", "inf", "-inf")
_LATEST = 1e11  # Unix seconds: some thousand years
_log = logging.getLogger(__name__)


class Journal:
    """Appends records to a journal; safe to call from several threads of one process.

    Args:
        path: the file; it is created, and a torn last line that a killed writer left is cut off.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        _cut_torn_line(self.path)
        self._file = self._open()

    def _open(self) -> io.FileIO:
        return io.FileIO(self.path, "ab")  # unbuffered: a line that was appended outlives a kill of this process

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system.

        ``time`` (Unix seconds) is added unless given. NaN and infinities are not JSON: they become null and are
        named under ``nonfinite``. Secrets inside URIs are removed.

        Raises:
            InputError: the disk is full or fails; what was written before stays whole.
        """
        line = json_line({"time": time.time(), **record})
        with self._lock:
            try:
                written = 0
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError as error:
                if written:
                    self._file.truncate(self._file.tell() - written)
                raise InputError(f"{self.path}: {error.strerror}; free some space and start again") from None

    def rewind_to_step(self, step: int) -> int:
        """Drop the training and watch lines past ``step``, which a resumed run will write again; events stay.

        The file is replaced in one rename. Returns the number of lines dropped.
        """
        with self._lock:
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if not _is_past(line, step)]
            if len(kept) < len(lines):
                self._file.close()
                with replacing(self.path) as file:
                    file.writelines(kept)
                self._file = self._open()
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Return once everything written so far is on the disk."""
        with self._lock:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; safe to call twice."""
        with self._lock:
            self._file.close()


def read_journal(path: str | Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """Records from byte ``offset`` on, each with the byte offset of its line's end.

    A last line without its newline is still being written, or was torn by a kill: it is not yielded. A damaged line
    in the middle is skipped with a warning.
    """
    with Path(path).open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            record = _decode(line)
            if record is None:
                _log.warning("%s: skipped a damaged line that ends at byte %d", path, offset)
            else:
                yield record, offset


def training_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The training lines of a journal, in file order."""
    return (record for record, _ in read_journal(path) if is_training(record))


def watch_lines(path: str | Path) -> Iterator[dict[str, Any]]:
    """The watch lines of a journal, in file order, with their step as ``step``."""
    for record, _ in read_journal(path):
        if is_watch(record):
            yield {"step": record["in_step"], **record}


def last_tick(path: Path) -> int:
    """The last ``tick`` of a journal's system lines; -1 where there is none."""
    with path.open("rb") as file:  # (most lines are training lines, which are not decoded)
        records = [_decode(line) for line in file if b'"tick"' in line]
    return max((record["tick"] for record in records if record is not None and "tick" in record), default=-1)


def is_training(record: Mapping[str, Any]) -> bool:
    """True for the record of an optimizer step."""
    return "event" not in record and "step" in record


def is_watch(record: Mapping[str, Any]) -> bool:
    """True for measurements of the encoder after an optimizer step."""
    return record.get("event") == WATCH and is_whole(record.get("in_step"))


def _decode(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None where it is none that ``Journal`` writes."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    seconds, odd = record.get("time", 0), record.get(NONFINITE, {})
    if not (is_number(seconds) and abs(seconds) < _LATEST and isinstance(odd, dict)):
        return None
    valid = isinstance(record["event"], str) if "event" in record else is_whole(record.get("step", 0))
    whole = valid and is_whole(record.get("tick", 0)) and all(str(value) in _NONFINITE_WORDS for value in odd.values())
    return record if whole else None


def _is_past(line: bytes, step: int) -> bool:
    record = _decode(line)
    if record is None:
        return False
    past = record["step"] if is_training(record) else record["in_step"] if is_watch(record) else step
    return bool(past > step)


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        end = size = file.seek(0, os.SEEK_END)
        while end > 0:  # backwards in blocks, so that a long journal is not read whole
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            file.truncate(end)
            _log.warning("%s: cut off a torn last line of %d bytes", path, size - end)
