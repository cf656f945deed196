"""Send new journal lines to MLflow in batches.

A line sent twice (killed between the sending and the remembering) makes the same rows, which MLflow's database keeps
once. A job and any number of syncs of one folder take turns.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2cl.common.locks import exclusive_lock
from ca2cl.common.records import NONFINITE, is_file_name, is_number, is_whole, lies_in
from ca2cl.common.scratch import NoScratch
from ca2cl.errors import InputError
from ca2cl.store.inputs import log_inputs
from ca2cl.store.open import Store, StoreAway, away_errors, reason
from ca2cl.store.upload import upload
from ca2cl.tracking.bookmark import Bookmark
from ca2cl.tracking.journal import JOURNAL_NAME, WATCH, WATCH_PREFIX, read_journal

if TYPE_CHECKING:
    from mlflow.entities import Metric

MIRROR_NAME = "mirror.json"
LOCK_NAME = ".mirror.lock"
BATCH = 1000  # metrics in one request: the limit of MLflow's log-batch
_NOT_METRICS = frozenset({"step", "in_step", "tick", "time", "event", NONFINITE})
_NUMBERS = ("system", WATCH)  # events whose numbers are metrics
_TEXT_LIMIT = {"params": 6000, "tags": 8000}  # characters that MLflow's stores take
_PER_REQUEST = 100  # parameters or tags in one request: the limit of MLflow's log-batch
_UNKNOWN = 2**62
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError)
_REFUSED = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "BAD_REQUEST"})
_DELETED = "must be in the 'active' state"  # MLflow's words for a run, under the code of a bad value
_MARKS = ("loss", f"{WATCH_PREFIX}rank")
"""Metrics by which the line of a step is known again: of the training, and of a watch."""
_SAME_LOSS = 1e-3  # relative
_log = logging.getLogger(__name__)


class Replayer:
    """Sends the journal's lines, from the last one sent to the newest, to one MLflow run.

    Args:
        run_id: of the run; empty while no store has given it one.
        find: called for the run's id before anything is sent, until it raises no error.
    """

    def __init__(
        self, run_dir: str | Path, store: Store, run_id: str = "", find: Callable[[], str] | None = None
    ) -> None:
        self.run_dir, self.store, self.run_id = Path(run_dir), store, run_id
        self._find = find
        self.journal = self.run_dir / JOURNAL_NAME
        self._bookmark = Bookmark(self.run_dir / MIRROR_NAME, self.journal)
        self._progress: Callable[[int], object] | None = None
        self._newest = _UNKNOWN  # step that MLflow may have
        self._known: dict[str, dict[int, list[float]]] | None = None  # what it has of _MARKS, once that is asked for
        self.offset = self._recall()

    @property
    def place(self) -> str:
        """Name of the store in messages."""
        return f"MLflow at {self.store.public_uri}"

    @property
    def failures(self) -> tuple[type[Exception], ...]:
        """Exceptions of ``meet`` and ``send`` when the store is away or refuses."""
        return (*away_errors(), InputError)

    @property
    def pending(self) -> bool:
        """True if the journal has bytes that were not sent."""
        return self.journal.exists() and self.journal.stat().st_size > self.offset

    def meet(self) -> None:
        """Find or make the run, once.

        Raises:
            InputError: the store is away (``StoreAway``) or refuses.
        """
        if self._find is not None:
            with _in_turn(self.run_dir):
                self.run_id = self._find()
            self._find = None

    def send(self, stop: threading.Event | None = None, progress: Callable[[int], object] | None = None) -> int:
        """Send all complete new lines; returns their number. Remembers progress after every request.

        Args:
            stop: ends it before the next line once it is set.
            progress: called with the number of the journal's bytes that MLflow has, whenever it has more.

        Raises:
            InputError: as ``meet``.
            Exception: whatever MLflow raises when it is away; what was sent before stays remembered.
        """
        self.meet()
        if not self.journal.exists():
            return 0
        with _in_turn(self.run_dir):
            self.offset = self._recall()  # another process may have sent some; a resumed run may have rewound it
            self._progress = progress
            return self._send_from_here(stop)

    def _send_from_here(self, stop: threading.Event | None) -> int:
        sent, waiting, metrics = 0, 0, list[Any]()
        end = self.offset
        for record, line_end in read_journal(self.journal, self.offset):
            if stop is not None and stop.is_set():
                break
            if "event" in record and record["event"] not in _NUMBERS:
                self._send_metrics(metrics, end)
                sent, waiting, metrics = sent + waiting + 1, 0, []
                self._send_event(record)
                self._remember(line_end)
            else:
                new = list(metrics_of(record))
                if self._done_again(new):
                    new = []
                if len(metrics) + len(new) > BATCH:
                    self._send_metrics(metrics, end)
                    sent, waiting, metrics = sent + waiting, 0, []
                metrics += new
                waiting += 1
            end = line_end
        self._send_metrics(metrics, end)
        return sent + waiting

    def _send_metrics(self, metrics: list[Metric], end: int) -> None:
        newest = max((one.step for one in metrics if one.key in _MARKS), default=0)
        if newest > self._newest:
            self._newest = newest
            self._remember(self.offset)  # before: a process that is killed after MLflow has them knows that it may
        for start in range(0, len(metrics), BATCH):
            part = metrics[start : start + BATCH]
            with _skip_refused(f"batch of {len(part)} metrics"):
                self.store.client.log_batch(self.run_id, metrics=part)
        if end > self.offset:
            self._remember(end)

    def _done_again(self, metrics: Sequence[Metric]) -> bool:
        """True if MLflow has a step's numbers already. A resumed job repeats the steps after its checkpoint: the same
        numbers, on GPUs but for their last digits, at another time. MLflow would keep both as points of their own."""
        mark = next((one for one in metrics if one.key in _MARKS), None)
        if mark is None or mark.step > self._newest:
            return False
        if self._known is None:
            self._known = {key: self._history(key) for key in _MARKS}
            self._newest = max((step for history in self._known.values() for step in history), default=0)
        return any(_alike(mark.value, one) for one in self._known[mark.key].get(mark.step, ()))

    def _history(self, key: str) -> dict[int, list[float]]:
        """What MLflow has of a metric, by step."""
        found: dict[int, list[float]] = {}
        for point in self.store.client.get_metric_history(self.run_id, key):
            found.setdefault(point.step, []).append(point.value)
        return found

    def _send_event(self, record: Mapping[str, Any]) -> None:
        kind = record["event"]
        with _skip_refused(f"{kind} line"):
            if kind in ("params", "tags"):
                self._send_texts(kind, record[kind])
            elif kind == "artifact":
                path, to = self._own(record["path"]), record.get("to") or None
                if to is not None and not is_file_name(to):
                    raise ValueError(f"{to!r} is no folder of the run's artifacts")
                if path.exists():
                    upload(self.store, self.run_id, path, to)
                else:
                    _log.warning("%s: gone before it could be copied to MLflow", path)
            elif kind == "inputs":
                log_inputs(self.store, self.run_id, record["inputs"])
            elif kind == "status":
                self._send_status(str(record["status"]), int(record["time"] * 1000))
            elif kind == "encoder":
                from ca2cl.registry.register import log_and_register, name_run

                folder = self._own(record["path"])
                name_run(folder, self.run_id)
                log_and_register(self.run_id, folder, record.get("register_as"), self.store, alias=record.get("alias"))

    def _own(self, name: str) -> Path:
        """The path that a line names in the run's folder; a journal from elsewhere must not have other files sent."""
        path = self.run_dir / name
        for one in (path, *path.rglob("*")):  # a link in a folder, too
            if not lies_in(self.run_dir, one):
                raise ValueError(f"{str(one.relative_to(self.run_dir))!r} lies outside the run's folder")
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
        self._bookmark.write(end, self.run_id, newest=self._newest)
        self.offset = end
        if self._progress is not None:
            self._progress(end)

    def _recall(self) -> int:
        """Byte offset up to which the journal was sent; 0 when it was rewritten since or belongs to another run."""
        offset, state = self._bookmark.read(self.run_id)
        newest = state.get("newest", _UNKNOWN)
        self._newest = newest if is_whole(newest) else _UNKNOWN
        return offset


def metrics_of(record: Mapping[str, Any]) -> Iterator[Metric]:
    """The MLflow metrics of a line: its numbers at its step and time; NaN and infinities are restored."""
    from mlflow.entities import Metric

    step = int(record.get("step", record.get("in_step", record.get("tick", 0))))
    timestamp = int(float(record.get("time", time.time())) * 1000)
    values = {**record, **{name: float(text) for name, text in record.get(NONFINITE, {}).items() if name in record}}
    for name, value in values.items():
        if name in _NOT_METRICS or not (is_number(value) or isinstance(value, float)):
            continue
        yield Metric(name, float(value), timestamp, step)


def _in_turn(folder: Path) -> AbstractContextManager[Any]:
    """One process at a time sends the run."""
    waiting = f"{folder}: another process sends this run to MLflow, waiting for it"
    return exclusive_lock(folder / LOCK_NAME, waiting=waiting)


def _passes(error: BaseException) -> bool:
    """True for a refusal that may pass: of a deleted run, which may be restored, or of a file server."""
    cause = error.__context__ if isinstance(error, InputError) else None
    unreadable = isinstance(cause, OSError) and not isinstance(cause, (FileNotFoundError, NotADirectoryError))
    return isinstance(error, (StoreAway, NoScratch)) or unreadable or _DELETED in str(error)


def _alike(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME_LOSS) or (math.isnan(one) and math.isnan(other))


@contextmanager
def _skip_refused(what: str) -> Iterator[None]:
    """Skip a line that MLflow understands and refuses, with a warning: trying again could never succeed."""
    try:
        yield
    except Exception as error:
        damaged = isinstance(error, _DAMAGED) and not isinstance(error, away_errors())
        if not (damaged or getattr(error, "error_code", None) in _REFUSED) or _passes(error):
            raise
        _log.warning("MLflow refuses a %s, skipped: %s", what, reason(error))
