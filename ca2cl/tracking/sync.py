"""``ca2cl sync``: send the journal lines that MLflow missed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ca2cl.common.console.progress import ProgressBar
from ca2cl.common.console.summary import going_on
from ca2cl.errors import InputError
from ca2cl.store.open import store_errors
from ca2cl.tracking.journal import JOURNAL_NAME
from ca2cl.tracking.run_record import read_run, replayer_of, store_of

POSITIONAL = ("run_dir",)


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """Send the missing metrics and artifacts of a run to MLflow; nothing is sent twice."""

    run_dir: str
    """Folder of the run, with journal.jsonl and run.json."""
    uri: str | None = None
    """MLflow tracking URI; none uses MLFLOW_TRACKING_URI, or else that of the run."""


def sync(run_dir: str | Path, uri: str | None = None) -> int:
    """Send the journal's lines that MLflow does not have yet; returns their number.

    Raises:
        InputError: no run in the folder, its store cannot be reached, refuses, or does not know the run.
    """
    folder = Path(run_dir)
    record = read_run(folder)
    if not (folder / JOURNAL_NAME).exists():
        raise InputError(f"{folder / JOURNAL_NAME}: no journal here; give a folder that a run wrote")
    store = store_of(folder, record, uri)
    size = (folder / JOURNAL_NAME).stat().st_size
    with store_errors(store.uri), ProgressBar(total=size, desc="send", unit="B", unit_scale=True, leave=False) as bar:
        return replayer_of(folder, record, store).send(progress=lambda end: bar.update(end - bar.n))


def run(config: SyncConfig) -> int:
    """The verb: exit code 0."""
    sent = sync(config.run_dir, config.uri)
    sys.stdout.write(f"{sent} journal lines sent to MLflow\n" if sent else "MLflow already has all of this run\n")
    sys.stdout.write(going_on(["ca2cl", "ui", config.run_dir], ["ca2cl", "report", config.run_dir, "report.html"]))
    return 0
