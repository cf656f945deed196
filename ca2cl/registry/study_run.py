"""Parent run of a study in MLflow, with its nested runs."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ca2cl.common.files import write_atomic
from ca2cl.common.locks import exclusive_lock
from ca2cl.common.records import parse_json
from ca2cl.common.redact import redact
from ca2cl.registry.evaluation_run import PARENT_TAG, SOURCE_RUN_TAG
from ca2cl.store.notes import description_tag, source_tags
from ca2cl.store.open import Store, all_pages, find_run, open_store, store_errors
from ca2cl.store.upload import upload

_BATCH = 100
_REMEDY = "free some space; the study is logged"


def log_study(
    record: Path,
    children: Sequence[str],
    *,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path],
    tags: Mapping[str, str],
    description: str,
    finished: bool,
    uri: str | None,
    root: str | Path,
    experiment: str,
) -> str:
    """Log a study's table as one run; its jobs' runs and their probes become nested runs.

    The study has one run however often it is logged. Results that are there already are not sent again.

    Args:
        record: JSON file that keeps the run's id, and the results that it has.
        children: ids of the trainings' runs.
        name: of the run.
        params: settings.
        metrics: finite numbers by name.
        artifacts: files to keep with the run.
        tags: more tags.
        description: of the run, in Markdown.
        finished: all jobs are done; otherwise the run stays RUNNING.

    Returns:
        The run's id.

    Raises:
        InputError: the store cannot be used.
    """
    store = open_store(uri, root)
    content = [dict(metrics), list(children), finished, [str(path) for path in artifacts]]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    with exclusive_lock(record.with_name(f".{record.name}.lock")), store_errors(store.uri):
        run_id, logged = _read(record)
        if run_id and find_run(store, run_id) is None:
            run_id, logged = "", ""  # another store
        if not run_id:
            own = {**source_tags(), "mlflow.runName": name, "ca2cl.kind": "study"}
            run_id = str(store.client.create_run(store.experiment_id(experiment), tags=own).info.run_id)
            _write(record, run_id, "")
            _log_params(store, run_id, params)
        if logged != digest:
            _nest(store, run_id, children, store.experiment_id(experiment))
            _log_results(store, run_id, metrics, artifacts)
            for key, value in {**tags, **description_tag(description)}.items():
                store.client.set_tag(run_id, key, value)
            if finished:
                store.client.set_terminated(run_id, "FINISHED")
            _write(record, run_id, digest)
    return run_id


def _read(record: Path) -> tuple[str, str]:
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: logged anew
        held = parse_json(record.read_text(encoding="utf-8"))
        return str(held["run_id"]), str(held["digest"])
    return "", ""


def _write(record: Path, run_id: str, digest: str) -> None:
    write_atomic(record, json.dumps({"run_id": run_id, "digest": digest}).encode(), _REMEDY)


def _log_params(store: Store, run_id: str, params: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    entries = [Param(key, redact(str(value))) for key, value in params.items()]
    for start in range(0, len(entries), _BATCH):
        store.client.log_batch(run_id, params=entries[start : start + _BATCH])


def _log_results(store: Store, run_id: str, metrics: Mapping[str, float], artifacts: Sequence[Path]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    points = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
    for start in range(0, len(points), _BATCH):
        store.client.log_batch(run_id, metrics=points[start : start + _BATCH])
    for path in artifacts:
        upload(store, run_id, path)


def _nest(store: Store, parent: str, children: Sequence[str], experiment_id: str) -> None:
    """Tag the trainings and their probes with their parent. One that the store does not have (yet) is left out."""
    for child in children:
        if find_run(store, child) is None:
            continue
        probes = all_pages(store.client.search_runs, [experiment_id], f"tags.`{SOURCE_RUN_TAG}` = '{child}'")
        for run_id in (child, *(str(run.info.run_id) for run in probes)):
            store.client.set_tag(run_id, PARENT_TAG, parent)
