"""One job's run: its folder with the journal, its MLflow run, and the thread that keeps the second like the first."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from ca2cl.config import TrackingConfig, flatten, to_dict
from ca2cl.errors import InputError
from ca2cl.redact import redact_all
from ca2cl.tracking.environment import environment, git_commit, requirements
from ca2cl.tracking.journal import JOURNAL_NAME, Journal, write_atomic
from ca2cl.tracking.mirror import Mirror, Replayer
from ca2cl.tracking.store import Store, fetch_run, open_store, store_errors
from ca2cl.tracking.system import SystemSampler
from ca2cl.untrusted import is_number, is_text, parse_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN_NAME = "run.json"
_RUN_ID = re.compile(r"[\w-]{1,64}")  # it becomes a part of paths and addresses
Status = Literal["FINISHED", "FAILED", "KILLED"]
_log = logging.getLogger(__name__)


class Tracked(Protocol):
    """The settings of a job that has a run: any dataclass with these among them."""

    @property
    def tracking(self) -> TrackingConfig:
        """Where its numbers go."""


@dataclass(frozen=True)
class RunRecord:
    """What ``run.json`` holds: which MLflow run this folder belongs to. Never a secret."""

    run_id: str
    tracking_uri: str
    experiment: str
    created: float
    """Unix seconds of the first start."""
    params: dict[str, str]
    """Flattened configuration of the first start; MLflow's parameters can never change."""


def read_run(run_dir: str | Path) -> RunRecord:
    """The ``run.json`` of a run folder.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = Path(run_dir) / RUN_NAME
    try:
        record = RunRecord(**parse_json(path.read_text(encoding="utf-8")))
        wrong = _wrong_field(record)
        if wrong:
            raise ValueError(f"{wrong} is of the wrong kind")
        return record
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no run here; give a folder that a run wrote") from None
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error}); restore it or start a new run in another folder") from None


def _wrong_field(record: RunRecord) -> str | None:
    texts = isinstance(record.params, dict) and all(map(is_text, record.params.values()))
    holds = {
        "run_id": isinstance(record.run_id, str) and _RUN_ID.fullmatch(record.run_id),
        "tracking_uri": is_text(record.tracking_uri),
        "experiment": is_text(record.experiment),
        "created": is_number(record.created),
        "params": texts,
    }
    return next((name for name, good in holds.items() if not good), None)


class NullTracker:
    """What every rank but the first holds: takes everything, writes nothing."""

    run_id: str = ""

    def log_step(self, record: Mapping[str, Any]) -> None:
        """Write a training line; it needs ``step`` (optimizer steps done) and ``loss``."""

    def log_event(self, event: str, **fields: Any) -> None:
        """Write a line that is not a training line, such as a bad sample's key and reason."""

    def log_figure(self, name: str, figure: Figure) -> None:
        """Save a figure as ``figures/NAME.png``, in the folder and in MLflow."""

    def log_artifact(self, path: str | Path, to: str = "") -> None:
        """Copy a file or folder that lies inside the run's folder to MLflow, under the artifact folder ``to``."""

    def log_encoder(self, folder: str | Path, register_as: str | None) -> None:
        """Copy a folder that ``save_encoder`` wrote to MLflow, and register it under the name unless None."""

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the MLflow run."""

    def finish(self, status: Status, timeout: float = 120.0) -> bool:
        """End the run; returns whether MLflow has everything, after waiting for that at most ``timeout`` seconds."""
        return True


class RunTracker(NullTracker):
    """What rank 0 holds. Make it with ``open_run``."""

    def __init__(self, run_dir: Path, record: RunRecord, store: Store, rewind_to: int | None = None) -> None:
        self.run_dir, self.record, self.run_id = run_dir, record, record.run_id
        self.journal = Journal(run_dir / JOURNAL_NAME)
        if rewind_to is not None:  # before the mirror looks for its place in the journal
            self.journal.rewind_to_step(rewind_to)
        self._mirror = Mirror(Replayer(run_dir, store, record.run_id))
        self._sampler = SystemSampler(self.journal, run_dir, record.created)

    def start(self) -> RunTracker:
        """Begin to mirror and to sample the system."""
        self._mirror.start()
        self._sampler.start()
        return self

    def log_step(self, record: Mapping[str, Any]) -> None:
        assert "step" in record and "loss" in record and "event" not in record
        self.journal.append(record)

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

    def log_encoder(self, folder: str | Path, register_as: str | None) -> None:
        self.log_event("encoder", path=self._relative(folder), register_as=register_as)

    def set_tag(self, name: str, value: str) -> None:
        self.log_event("tags", tags={name: value})

    def finish(self, status: Status, timeout: float = 120.0) -> bool:
        self._sampler.stop()
        self.log_event("status", status=status)
        self.journal.sync()
        complete = self._mirror.close(timeout)
        self.journal.close()
        if not complete:
            _log.warning("MLflow does not have all of this run; send the rest with: ca2cl sync %s", self.run_dir)
        return complete

    def _relative(self, path: str | Path) -> str:
        return str(Path(path).resolve().relative_to(self.run_dir.resolve()))


def open_run(
    run_dir: str | Path,
    config: Tracked,
    *,
    resume: bool = False,
    step: int = 0,
    manifest: Mapping[str, Any] | None = None,
) -> RunTracker:
    """Create the run of ``run_dir``, or go on with the one that is there.

    Args:
        resume: go on with the folder's run if it has one. Training lines past ``step`` are dropped from the journal,
            and parameters that changed become ``param_drift.*`` tags.
        step: optimizer steps done in the checkpoint that training goes on from.
        manifest: the data's manifest, kept with the run.

    Raises:
        InputError: the folder holds a run and ``resume`` is False, or cannot be written; a new run's store cannot be
            reached (a resumed run only warns); the run to resume is not in the store.
    """
    folder = Path(run_dir)
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        again = _used(folder, resume)
        store, record = _continue_run(folder, config) if again else _create_run(folder, config)
        tracker = RunTracker(folder, record, store, rewind_to=step if again else None)
        _write_description(tracker, config, manifest)
    except OSError as error:
        raise InputError(f"run.output_dir is {str(folder)!r}: {error.strerror}; use a folder you can write") from None
    except InputError:
        if new:  # a refused start leaves no folder behind
            with suppress(OSError):
                folder.rmdir()
        raise
    return tracker.start()


def _used(folder: Path, resume: bool) -> bool:
    used = (folder / RUN_NAME).exists() or (folder / JOURNAL_NAME).exists()
    if used and not resume:
        raise InputError(
            f"run.output_dir is {str(folder)!r}: it already holds a run; use another, or --run.resume auto"
        )
    return (folder / RUN_NAME).exists()


def _params(config: Tracked) -> dict[str, str]:
    return {name: str(value) for name, value in flatten(config).items()}


def _create_run(folder: Path, config: Tracked) -> tuple[Store, RunRecord]:
    tracking = config.tracking
    store = open_store(tracking.uri, tracking.root)
    experiment = store.experiment_id(tracking.experiment)
    run_id = create_mlflow_run(store, experiment, tracking.run_name or folder.resolve().name)
    record = RunRecord(run_id, store.public_uri, tracking.experiment, time.time(), _params(config))
    write_atomic(folder / RUN_NAME, json.dumps(asdict(record), indent=2).encode())
    return store, record


def create_mlflow_run(store: Store, experiment_id: str, name: str, tags: Mapping[str, str] | None = None) -> str:
    """Make an MLflow run and return its id.

    Raises:
        InputError: the store cannot be reached.
    """
    system = {"mlflow.source.name": "ca2cl", "mlflow.source.type": "LOCAL", "mlflow.user": os.environ.get("USER", "")}
    commit = git_commit()
    if commit:
        system["mlflow.source.git.commit"] = commit.partition("+")[0]
    with store_errors(store.uri):
        made = store.client.create_run(experiment_id, run_name=name, tags={**system, **(tags or {})})
    return str(made.info.run_id)


def _continue_run(folder: Path, config: Tracked) -> tuple[Store, RunRecord]:
    record = read_run(folder)
    store = store_of(record, config.tracking.uri)
    try:
        reached = open_store(store.uri)
    except InputError as error:
        _log.warning("%s: the run goes on without it and is sent later", error)
        return store, record
    fetch_run(reached, record.run_id)
    return reached, record


def store_of(record: RunRecord, uri: str | None = None) -> Store:
    """The store that a run belongs to: the explicit URI, MLFLOW_TRACKING_URI, or the one the run was made in."""
    return open_store(uri or os.environ.get("MLFLOW_TRACKING_URI") or record.tracking_uri, check=False)


def _write_description(tracker: RunTracker, config: Tracked, manifest: Mapping[str, Any] | None) -> None:
    now, first = _params(config), tracker.record.params
    drift = {f"param_drift.{name}": f"{first.get(name)} -> {now[name]}" for name in now if now[name] != first.get(name)}
    tracker.log_event("status", status="RUNNING")
    tracker.log_event("params", params=first)  # again on resume: the first start may have died before it
    if drift:
        tracker.log_event("tags", tags=drift)
        _log.warning("resumed with changed settings: %s", ", ".join(sorted(drift)))
    if manifest is not None:
        tracker.set_tag("ca2cl.manifest_digest", str(manifest.get("digest", "")))
    files = {
        "config.yaml": yaml.safe_dump(redact_all(to_dict(config)), sort_keys=False),
        "environment.json": json.dumps(environment(), indent=2),
        "requirements.txt": requirements(),
        **({"manifest.json": json.dumps(manifest, indent=2)} if manifest is not None else {}),
    }
    for name, text in files.items():
        write_atomic(tracker.run_dir / name, text.encode())
        tracker.log_artifact(tracker.run_dir / name)
