"""MLflow's copy of a run: follows the journal, sends what is new, and remembers how far it came.

The journal file itself is the queue, so it is bounded by the disk and nothing in it is ever lost: a store that is away
costs one warning and a pause, and what it missed is sent when it is back, or by ``ca2cl sync RUN_DIR``. A line sent
twice (killed between the sending and the remembering) makes the same rows, which MLflow's database keeps once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2cl.tracking.journal import JOURNAL_NAME, NONFINITE, read_journal, write_atomic
from ca2cl.tracking.store import Store, away_errors, reason
from ca2cl.untrusted import is_file_name, is_number, is_whole, lies_in, parse_json

if TYPE_CHECKING:
    from mlflow.entities import Metric

MIRROR_NAME = "mirror.json"
BATCH = 1000  # metrics in one request: the limit of MLflow's log-batch
_NOT_METRICS = frozenset({"step", "tick", "time", "event", NONFINITE})
_TEXT_LIMIT = {"params": 6000, "tags": 8000}  # characters that MLflow's stores take
_PER_REQUEST = 100  # parameters or tags in one request: the limit of MLflow's log-batch
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
_REFUSED = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"})
_log = logging.getLogger(__name__)


class Replayer:
    """Sends the journal's lines, from the last one sent to the newest, to one MLflow run."""

    def __init__(self, run_dir: str | Path, store: Store, run_id: str) -> None:
        self.run_dir, self.store, self.run_id = Path(run_dir), store, run_id
        self.journal = self.run_dir / JOURNAL_NAME
        self._state = self.run_dir / MIRROR_NAME
        self.offset = self._recall()

    @property
    def pending(self) -> bool:
        """Whether the journal has bytes that were not sent."""
        return self.journal.exists() and self.journal.stat().st_size > self.offset

    def send(self, stop: threading.Event | None = None) -> int:
        """Send all complete new lines; returns their number. Remembers progress after every request.

        Raises:
            Exception: whatever MLflow raises when it is away; what was sent before stays remembered.
        """
        if not self.journal.exists():
            return 0
        if self.journal.stat().st_size < self.offset:  # rewound by a resumed run: send all again, rows are idempotent
            self.offset = 0
        sent, waiting, metrics = 0, 0, list[Any]()
        end = self.offset
        for record, line_end in read_journal(self.journal, self.offset):
            if stop is not None and stop.is_set():
                break
            if "event" in record and record["event"] != "system":
                self._send_metrics(metrics, end)
                sent, waiting, metrics = sent + waiting + 1, 0, []
                self._send_event(record)
                self._remember(line_end)
            else:
                new = list(metrics_of(record))
                if len(metrics) + len(new) > BATCH:
                    self._send_metrics(metrics, end)
                    sent, waiting, metrics = sent + waiting, 0, []
                metrics += new
                waiting += 1
            end = line_end
        self._send_metrics(metrics, end)
        return sent + waiting

    def _send_metrics(self, metrics: list[Metric], end: int) -> None:
        for start in range(0, len(metrics), BATCH):
            part = metrics[start : start + BATCH]
            with _skip_refused(f"batch of {len(part)} metrics"):
                self.store.client.log_batch(self.run_id, metrics=part)
        if end > self.offset:
            self._remember(end)

    def _send_event(self, record: Mapping[str, Any]) -> None:
        kind = record["event"]
        client = self.store.client
        with _skip_refused(f"{kind} line"):
            if kind in ("params", "tags"):
                self._send_texts(kind, record[kind])
            elif kind == "artifact":
                path, to = self._own(record["path"]), record.get("to") or None
                if to is not None and not is_file_name(to):
                    raise ValueError(f"{to!r} is no folder of the run's artifacts")
                if path.exists():
                    upload = client.log_artifacts if path.is_dir() else client.log_artifact
                    upload(self.run_id, str(path), to)
                else:
                    _log.warning("%s: gone before it could be copied to MLflow", path)
            elif kind == "status":
                self._send_status(str(record["status"]), int(record["time"] * 1000))
            elif kind == "encoder":
                from ca2cl.tracking.registry import log_and_register

                log_and_register(self.run_id, self._own(record["path"]), record.get("register_as"), self.store)

    def _own(self, name: str) -> Path:
        """What a line names in the run's folder; a journal from elsewhere must not have other files sent."""
        path = self.run_dir / name
        if not lies_in(self.run_dir, path):
            raise ValueError(f"{name!r} lies outside the run's folder")
        return path

    def _send_texts(self, kind: str, texts: Mapping[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        make = Param if kind == "params" else RunTag
        rows = [make(name, str(value)[: _TEXT_LIMIT[kind]]) for name, value in texts.items()]
        for start in range(0, len(rows), _PER_REQUEST):
            self.store.client.log_batch(self.run_id, **{kind: rows[start : start + _PER_REQUEST]})

    def _send_status(self, status: str, time_ms: int) -> None:
        if status == "RUNNING":
            self.store.client.update_run(self.run_id, status=status)
        else:
            self.store.client.set_terminated(self.run_id, status, time_ms)

    def _remember(self, end: int) -> None:
        state = {"run_id": self.run_id, "offset": end, "tail": self._tail(end)}
        write_atomic(self._state, json.dumps(state).encode())
        self.offset = end

    def _recall(self) -> int:
        """Byte offset up to which the journal was sent; 0 when it was rewritten since or belongs to another run."""
        try:
            state = parse_json(self._state.read_text())
            offset = state["offset"]
            same = is_whole(offset) and state["run_id"] == self.run_id and state["tail"] == self._tail(offset)
        except (OSError, ValueError, KeyError, TypeError):
            return 0
        return offset if same else 0

    def _tail(self, end: int) -> str:
        """Digest of the last bytes before ``end``: tells a rewritten journal from the one that was sent."""
        with self.journal.open("rb") as file:
            start = max(0, end - 512)
            file.seek(start)
            return hashlib.sha256(file.read(end - start)).hexdigest()


class Mirror:
    """A thread that keeps an MLflow run in step with the journal and never holds up the one who writes it.

    Args:
        replayer: what to send and where.
        interval: seconds between looks at the journal.
        longest_pause: seconds that the pause between tries grows to while the store is away.
    """

    def __init__(self, replayer: Replayer, *, interval: float = 2.0, longest_pause: float = 60.0) -> None:
        self._replayer, self._interval, self._longest_pause = replayer, interval, longest_pause
        self._closing = threading.Event()
        self._giving_up = threading.Event()
        self._away = False
        self._thread = threading.Thread(target=self._run, name="ca2cl-mirror", daemon=True)

    def start(self) -> Mirror:
        """Begin to follow the journal."""
        self._thread.start()
        return self

    def close(self, timeout: float = 60.0) -> bool:
        """Send what is left, for at most ``timeout`` seconds; returns whether MLflow now has everything."""
        self._closing.set()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._giving_up.set()
            self._thread.join(1.0)
        return not self._thread.is_alive() and not self._replayer.pending

    def _run(self) -> None:
        pause = self._interval
        while not self._giving_up.is_set():
            last_look = self._closing.is_set()
            if self._try_once():
                pause = self._interval
                if last_look:
                    return
            elif last_look:
                return  # one try at the end: `ca2cl sync` has the rest
            else:
                pause = min(2 * pause, self._longest_pause)
            self._closing.wait(pause)

    def _try_once(self) -> bool:
        try:
            self._replayer.send(self._giving_up)
        except away_errors() as error:
            if not self._away:
                _log.warning(
                    "MLflow at %s is away (%s): training goes on, the journal keeps everything and is sent later",
                    self._replayer.store.public_uri,
                    reason(error),
                )
            self._away = True
            return False
        if self._away:
            _log.warning("MLflow at %s is back and up to date", self._replayer.store.public_uri)
        self._away = False
        return True


def metrics_of(record: Mapping[str, Any]) -> Iterator[Metric]:
    """The MLflow metrics of a line: its numbers at its step and time; NaN and infinities are restored."""
    from mlflow.entities import Metric

    step = int(record.get("step", record.get("tick", 0)))
    timestamp = int(float(record.get("time", time.time())) * 1000)
    values = {**record, **{name: float(text) for name, text in record.get(NONFINITE, {}).items() if name in record}}
    for name, value in values.items():
        if name in _NOT_METRICS or not (is_number(value) or isinstance(value, float)):
            continue
        yield Metric(name, float(value), timestamp, step)


class _skip_refused:  # noqa: N801  reads as a statement
    """A line that MLflow understands and refuses is skipped with a warning: trying again could never succeed."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        damaged = isinstance(error, _DAMAGED) and not isinstance(error, away_errors())
        if error is None or not (damaged or getattr(error, "error_code", None) in _REFUSED):
            return False
        _log.warning("MLflow refuses a %s, skipped: %s", self._what, reason(error))
        return True
