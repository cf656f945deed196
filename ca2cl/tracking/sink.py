"""Protocol of a metrics tracker beside MLflow, and its replayer.

The journal is the truth, and a tracker only mirrors it: MLflow through ``replay``, any other through a sink. A new one
is a class with this form, named ``--tracking.sinks module:Class``, or by an installed package's entry point in the
group ``ca2cl.sinks``. Encoders are registered in MLflow alone.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ca2cl.common.plugins import extension_path, load_plugin
from ca2cl.tracking.bookmark import Bookmark
from ca2cl.tracking.journal import JOURNAL_NAME, read_journal

_LINES = 500


class Sink(Protocol):
    """A metrics tracker. It is made with the run's folder, its name and its parameters."""

    def write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take lines of the journal, in order.

        A training line has ``step``, ``loss`` and other numbers; any other line an ``event``. Any exception means that
        the tracker is away: the same lines come again later. After a crash, lines may come twice.
        """


class SinkReplayer:
    """Sends the journal's new lines to one sink.

    Args:
        run_dir: folder of the run.
        sink: ``module:Class``, or an installed package's name for one.
        name: of the run.
        params: of the run, by their dotted names.

    Raises:
        InputError: there is no such class.
    """

    failures: tuple[type[Exception], ...] = (Exception,)
    run_id = ""

    def __init__(self, run_dir: Path, sink: str, name: str, params: Mapping[str, str]) -> None:
        self.place = sink
        path = extension_path("ca2cl.sinks", sink, "tracking.sinks")
        self._sink: Sink = load_plugin(path, "tracking.sinks")(run_dir, name, params)
        self._journal = run_dir / JOURNAL_NAME
        self._bookmark = Bookmark(run_dir / f"sink-{sink.replace(':', '.')}.json", self._journal)
        self.offset = self._bookmark.read("")[0]

    @property
    def pending(self) -> bool:
        """True if the journal has bytes that were not sent."""
        return self._journal.exists() and self._journal.stat().st_size > self.offset

    def meet(self) -> None:
        """Do nothing: a sink makes its run when it is made."""

    def send(self, stop: threading.Event | None = None) -> int:
        """Send all complete new lines; returns their number. Remembers progress after every ``_LINES``."""
        sent, lines, end = 0, list[dict[str, Any]](), self.offset
        if not self._journal.exists():
            return 0
        for record, line_end in read_journal(self._journal, self.offset):
            if stop is not None and stop.is_set():
                break
            lines.append(record)
            end = line_end
            if len(lines) == _LINES:
                sent, lines = sent + self._send(lines, end), []
        return sent + self._send(lines, end)

    def _send(self, lines: list[dict[str, Any]], end: int) -> int:
        if lines:
            self._sink.write(lines)
            self._bookmark.write(end, "")
            self.offset = end
        return len(lines)
