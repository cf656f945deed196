"""Downstream results as MLflow runs of their own, tied to the run that the encoder came from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ca2cl.tracking.journal import redact
from ca2cl.tracking.store import DEFAULT_ROOT, open_store, store_errors

SOURCE_RUN_TAG = "ca2cl.source_run_id"
_PARAM_LENGTH = 6000  # MLflow's limit on a parameter's value
_BATCH = 100  # parameters or tags in one request; MLflow takes 1,000 metrics but no more than 100 of these


def log_evaluation(
    *,
    source_run_id: str | None,
    name: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    artifacts: Sequence[Path],
    tags: Mapping[str, str] | None = None,
    uri: str | None = None,
    root: str | Path = DEFAULT_ROOT,
    experiment: str = "ca2cl",
) -> str:
    """Log a finished evaluation as one FINISHED run.

    Args:
        source_run_id: run that made the encoder, kept as the tag ``ca2cl.source_run_id``; None leaves the tag out.
        name: of the run, e.g. ``probe``.
        params: settings; secrets in URIs are removed.
        metrics: finite numbers by name.
        artifacts: files to keep with the run.
        tags: more tags, e.g. manifest digests.

    Returns:
        The new run's id.

    Raises:
        InputError: the store cannot be used, or the experiment was deleted. A run that was begun ends as FAILED.
    """
    from mlflow.entities import Metric, Param

    store = open_store(uri, root)
    all_tags = {"mlflow.runName": name, **(tags or {})}
    if source_run_id is not None:
        all_tags[SOURCE_RUN_TAG] = source_run_id
    run_id: str = ""
    with store_errors(store.uri):
        try:
            created = store.client.create_run(store.experiment_id(experiment), tags=all_tags)
            run_id = str(created.info.run_id)
            now = int(time.time() * 1000)
            entries = [Param(key, redact(str(value))[:_PARAM_LENGTH]) for key, value in params.items()]
            for start in range(0, len(entries), _BATCH):
                store.client.log_batch(run_id, params=entries[start : start + _BATCH])
            points = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
            for start in range(0, len(points), _BATCH):
                store.client.log_batch(run_id, metrics=points[start : start + _BATCH])
            for path in artifacts:
                store.client.log_artifact(run_id, str(path))
            store.client.set_terminated(run_id, "FINISHED")
        except BaseException:
            if run_id:
                store.client.set_terminated(run_id, "FAILED")
            raise
    return run_id
