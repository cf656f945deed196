"""Run of a job: folder, journal, MLflow run and mirror thread."""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from ca2cl.common.files import replacing
from ca2cl.common.job_dir import JobDir
from ca2cl.common.mlflow_names import LONGEST_RUN_NAME
from ca2cl.common.redact import redact_all
from ca2cl.config import TrackingConfig, flatten, to_dict
from ca2cl.errors import InputError
from ca2cl.store.inputs import describe_input
from ca2cl.store.notes import description_tag
from ca2cl.store.open import Store, check_host, is_server, open_store
from ca2cl.tracking.environment import environment, requirements
from ca2cl.tracking.journal import JOURNAL_NAME, WATCH, WATCH_PREFIX, Journal
from ca2cl.tracking.mirror import Mirror
from ca2cl.tracking.replay import LOCK_NAME
from ca2cl.tracking.run_record import (
    KEY_TAG,
    RUN_NAME,
    RunRecord,
    beside,
    read_run,
    replayer_of,
    store_of,
    system_tags,
    write_run,
)
from ca2cl.tracking.sink import SinkReplayer
from ca2cl.tracking.system_metrics import SystemSampler

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START_S = 20.0
"""Seconds that a start waits for a server's first answer before it goes on without."""
FINISH_S, KILLED_S = 120.0, 15.0
"""Seconds that an end waits while MLflow takes what is left (an encoder's upload may last). A preempted one has little
time before its scheduler kills it, a failed one before its launcher does: the other ranks have ended already."""
Status = Literal["FINISHED", "FAILED", "KILLED"]
_log = logging.getLogger(__name__)


class Tracked(Protocol):
    """The settings of a job that has a run: any dataclass with these among them."""

    @property
    def tracking(self) -> TrackingConfig:
        """Tracking settings."""


class NullTracker:
    """Tracker of every rank but the first: takes everything, writes nothing."""

    run_id: str = ""

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Write a training line; it needs ``step`` (optimizer steps done) and ``loss``."""

    def log_event(self, event: str, **fields: Any) -> None:
        """Write a line that is not a training line, such as a bad sample's key and reason."""

    def log_figure(self, name: str, figure: Figure) -> None:
        """Save a figure as ``figures/NAME.png``, in the folder and in MLflow."""

    def log_artifact(self, path: str | Path, to: str = "") -> None:
        """Copy a file or folder that lies inside the run's folder to MLflow, under the artifact folder ``to``."""

    def log_encoder(self, folder: str | Path, register_as: str | None, alias: str | None = None) -> None:
        """Copy a folder that ``save_encoder`` wrote to MLflow, and register it under the name unless None; ``alias`` as
        in ``log_and_register``."""

    def log_watch(self, step: int, numbers: Mapping[str, float], collapse: str = "") -> None:
        """Write a line with measurements of the encoder after an optimizer step, and the reason for a collapse."""

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""

    def describe(self, text: str) -> None:
        """Set the run's description, in Markdown."""
        for name, value in description_tag(text).items():
            self.set_tag(name, value)

    def await_run(self) -> None:
        """Return once MLflow has the run or is known to be away."""

    def finish(self, status: Status, timeout: float | None = None) -> bool:
        """End the run; returns whether MLflow has everything, after waiting for that at most ``timeout`` seconds (None:
        ``FINISH_S``, or ``KILLED_S``)."""
        return True


class RunTracker(NullTracker):
    """Tracker of rank 0. Make it with ``open_run``."""

    def __init__(
        self,
        run_dir: Path,
        record: RunRecord,
        store: Store,
        rewind_to: int | None = None,
        sinks: Sequence[str] = (),
        later: bool = False,
    ) -> None:
        self.run_dir, self.record, self._store, self._held = run_dir, record, store, ExitStack()
        self.journal = Journal(run_dir / JOURNAL_NAME)
        if rewind_to is not None:  # before the mirror looks for its place in the journal
            self.journal.rewind_to_step(rewind_to)
        self._replayer = replayer_of(run_dir, record, store)
        self._mirror = Mirror(self._replayer)
        self._later = self._waits = later
        self._sinks = [Mirror(SinkReplayer(run_dir, sink, record.name, record.params)) for sink in sinks]
        self._sampler = SystemSampler(self.journal, run_dir, record.created)

    @property
    def run_id(self) -> str:  # type: ignore[override]
        """MLflow's id of the run; empty as long as its server was away, or the run waits for the first step."""
        return self._replayer.run_id

    def connect(self) -> None:
        """Begin to mirror, and wait until the store has the run or turns out to be away.

        Raises:
            InputError: the store refuses the run.
        """
        for sink in self._sinks:
            sink.start()
        if self._later:
            return
        self._mirror.start()
        self._mirror.wait_for_run(START_S if is_server(self._store.uri) else None)

    def start(self, held: ExitStack) -> RunTracker:
        """Begin to sample the system; the folder stays locked until the run ends."""
        self._held = held.pop_all()
        self._sampler.start()
        return self

    def log_step(self, record: Mapping[str, Any]) -> None:
        assert "step" in record and "loss" in record and "event" not in record
        self.journal.append(record)
        self._stop_waiting()
        if self._mirror.refusal is not None:
            raise self._mirror.refusal

    def _stop_waiting(self) -> None:
        if self._waits:
            self._waits = False
            self._mirror.start()

    def await_run(self) -> None:
        if self._later:
            self._stop_waiting()
            self._mirror.wait_for_run(None)

    def log_event(self, event: str, **fields: Any) -> None:
        assert "step" not in fields, "a line with a step is a training line"
        self.journal.append({"event": event, **fields})

    def log_figure(self, name: str, figure: Figure) -> None:
        path = self.run_dir / "figures" / f"{name}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, dpi=110)
        except OSError as error:  # a picture is not worth a run
            _log.warning("%s: not drawn (%s)", path, error.strerror)
            return
        self.log_artifact(path, "figures")

    def log_artifact(self, path: str | Path, to: str = "") -> None:
        self.log_event("artifact", path=self._relative(path), to=to)

    def log_encoder(self, folder: str | Path, register_as: str | None, alias: str | None = None) -> None:
        named = {"alias": alias} if alias is not None else {}
        self.log_event("encoder", path=self._relative(folder), register_as=register_as, **named)

    def log_watch(self, step: int, numbers: Mapping[str, float], collapse: str = "") -> None:
        found = {f"{WATCH_PREFIX}{name}": value for name, value in numbers.items()}
        self.log_event(WATCH, in_step=step, **found, **({"collapse": collapse} if collapse else {}))

    def set_tag(self, name: str, value: str) -> None:
        self.log_event("tags", tags={name: value})

    def finish(self, status: Status, timeout: float | None = None) -> bool:
        if timeout is None:
            timeout = FINISH_S if status == "FINISHED" else KILLED_S
        self._sampler.stop()
        self.log_event("status", status=status)
        self.journal.sync()
        self._stop_waiting()
        complete = self._mirror.close(timeout)
        for sink in self._sinks:
            if not sink.close(timeout):
                _log.warning("%s does not have all of this run; the next start sends the rest", sink.place)
        self.close()
        if not complete:
            _log.warning("MLflow does not have all of this run; send the rest with: ca2cl sync %s", self.run_dir)
        return complete

    def close(self) -> None:
        """Release the folder, and leave the run's status as it is."""
        self.journal.close()
        self._held.close()

    def _relative(self, path: str | Path) -> str:
        return str(Path(path).resolve().relative_to(self.run_dir.resolve()))


@contextmanager
def hold_run(run_dir: str | Path) -> Iterator[ExitStack]:
    """Keep other jobs out of a run's folder, which is made where it is not there; ``open_run`` takes the stack over.

    Hold it before anything of the folder is looked at: the job before may still be writing its last checkpoint.

    Raises:
        InputError: another job works in it and does not end within ``LOCK_S`` seconds, or it cannot be written.
    """
    job = JobDir(
        Path(run_dir), record=RUN_NAME, setting="run.output_dir", remedy="give run.output_dir a folder you can write"
    )
    new = not job.path.exists()
    with ExitStack() as held:
        held.enter_context(job.locked())
        try:
            yield held
        except InputError:
            if new and not (job.path / RUN_NAME).exists():  # a refused start leaves no folder
                job.withdraw()
            raise


def open_run(
    run_dir: str | Path,
    config: Tracked,
    *,
    resume: bool = False,
    step: int = 0,
    manifest: Mapping[str, Any] | None = None,
    held: ExitStack | None = None,
    later: bool = False,
) -> RunTracker:
    """Create the run of ``run_dir``, or go on with the one that is there.

    Args:
        resume: go on with the folder's run if it has one. Training lines past ``step`` are dropped from the journal,
            and parameters that changed become ``param_drift.*`` tags.
        step: optimizer steps done in the checkpoint that training goes on from.
        manifest: the data's manifest, kept with the run.
        held: what ``hold_run`` gave for the folder, which ends with the run then; None: it is called here.
        later: let a new run wait for its first training line before MLflow is imported and makes it, if it will surely
            be taken (``Store.surely_takes``). Until then ``run_id`` is empty.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or cannot be written; the store refuses (wrong
            credentials, a deleted experiment, no such run to resume), or is none that works; another job works in
            the folder. A server that is away is only a warning: the run is made when it is back, or by ``ca2cl sync``.
    """
    if held is None:
        with hold_run(run_dir) as held:
            return open_run(run_dir, config, resume=resume, step=step, manifest=manifest, held=held, later=later)
    folder = Path(run_dir)
    try:
        again = _used(folder, resume)
        store, later = _store(folder, config.tracking, again, later)
        record = read_run(folder) if again else _begin_run(folder, config, store)
        tracker = RunTracker(
            folder, record, store, rewind_to=step if again else None, sinks=config.tracking.sinks, later=later
        )
        _connect(tracker, again)
        _write_description(tracker, config, manifest)
    except OSError as error:
        raise InputError(f"run.output_dir is {str(folder)!r}: {error.strerror}; use a folder you can write") from None
    return tracker.start(held)


def _connect(tracker: RunTracker, again: bool) -> None:
    try:
        tracker.connect()
    except InputError:
        tracker.journal.close()
        if not again:
            for name in (RUN_NAME, LOCK_NAME):
                (tracker.run_dir / name).unlink(missing_ok=True)
            if tracker.journal.path.stat().st_size == 0:
                tracker.journal.path.unlink()
        raise


def _used(folder: Path, resume: bool) -> bool:
    used = (folder / RUN_NAME).exists() or (folder / JOURNAL_NAME).exists()
    if used and not resume:
        raise InputError(
            f"run.output_dir is {str(folder)!r}: it already holds a run; use another, or --run.resume auto"
        )
    return (folder / RUN_NAME).exists()


def _params(config: Tracked) -> dict[str, str]:
    return {name: str(value) for name, value in flatten(config).items()}


def _store(folder: Path, tracking: TrackingConfig, again: bool, later: bool) -> tuple[Store, bool]:
    """The store of a run, and whether the run may wait for its first training line."""
    if again:
        return store_of(folder, read_run(folder), tracking.uri, tracking.root), False
    store = open_store(tracking.uri, tracking.root, check=False)
    if later and store.surely_takes(tracking.experiment):
        return store, True
    if is_server(store.uri):
        check_host(store.uri)
    else:  # nothing that comes back by itself
        store = open_store(tracking.uri, tracking.root)
    return store, False


def _begin_run(folder: Path, config: Tracked, store: Store) -> RunRecord:
    tracking = config.tracking
    record = RunRecord(
        "", store.public_uri, tracking.experiment, time.time(), _params(config),
        tracking.run_name or folder.resolve().name[:LONGEST_RUN_NAME], {**system_tags(), KEY_TAG: uuid.uuid4().hex},
        beside(folder, store),
    )  # fmt: skip
    write_run(folder, record)
    return record


def _write_description(tracker: RunTracker, config: Tracked, manifest: Mapping[str, Any] | None) -> None:
    now, first = _params(config), tracker.record.params
    drift = {name: f"{first[name]} -> {now[name]}" for name in now if name in first and now[name] != first[name]}
    tracker.log_event("status", status="RUNNING")
    tracker.log_event("params", params=first)  # again on resume: the first start may have died before it
    if drift:
        tracker.log_event("tags", tags={f"param_drift.{name}": change for name, change in drift.items()})
        _log.warning("resumed with changed settings: %s", ", ".join(" ".join(one) for one in sorted(drift.items())))
    if manifest is not None:
        tracker.set_tag("ca2cl.manifest_digest", str(manifest.get("digest", "")))
        tracker.log_event("inputs", inputs=[describe_input(now.get("data.shards", ""), manifest, "training")])
    files = {
        "config.yaml": yaml.safe_dump(redact_all(to_dict(config)), sort_keys=False),
        "environment.json": json.dumps(environment(), indent=2),
        "requirements.txt": requirements(),
        **({"manifest.json": json.dumps(manifest, indent=2)} if manifest is not None else {}),
    }
    for name, text in files.items():
        with replacing(tracker.run_dir / name) as file:
            file.write(text.encode())
        tracker.log_artifact(tracker.run_dir / name)
