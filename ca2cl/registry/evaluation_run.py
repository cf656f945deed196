"""Log downstream results as an MLflow run tied to the encoder's."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ca2cl.common.files import write_atomic
from ca2cl.common.records import parse_json
from ca2cl.common.redact import redact, redact_all
from ca2cl.store.inputs import log_inputs
from ca2cl.store.notes import description_tag, source_tags
from ca2cl.store.open import DEFAULT_ROOT, Store, find_run, open_store, store_errors
from ca2cl.store.upload import upload

SOURCE_RUN_TAG = "ca2cl.source_run_id"
PARENT_TAG = "mlflow.parentRunId"
LEAK_TAG = "ca2cl.leak"
"""Overlap of the test set with the data that the encoder or the classifier has seen; absent where none is known."""
TOKENS_TAG = "ca2cl.tokens"
"""Tokens of a ViT that the features were made of; absent for the encoder's own pooling."""
VERDICT_TAG = "ca2cl.verdict"
"""What the results show, in a sentence."""
TRAINED_ON_TEST = "encoder trained on the test shards"
TRAINED_ON_TILES = "encoder trained on test tiles"
TRAINED_ON_SLIDES = "encoder trained on test slides"
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
    inputs: Sequence[Mapping[str, Any]] = (),
    children: Sequence[str] = (),
    description: str = "",
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
        description: of the run, in Markdown.
        inputs: data sets (``store.inputs.describe_input``).
        children: ids of runs that MLflow's pages show below this one; those that the store does not have are left out.

    Returns:
        The new run's id.

    Raises:
        InputError: the store cannot be used, or the experiment was deleted. A run that was begun ends as FAILED.
    """
    store = open_store(uri, root)
    note = {**(description_tag(description) if description else {}), "mlflow.runName": name}
    all_tags: dict[str, str] = redact_all({**source_tags(), **(tags or {}), **note})
    if source_run_id is not None:
        all_tags[SOURCE_RUN_TAG] = source_run_id
    run_id: str = ""
    with store_errors(store.uri):
        try:
            created = store.client.create_run(store.experiment_id(experiment), tags=all_tags)
            run_id = str(created.info.run_id)
            _log_numbers(store, run_id, params, metrics)
            if inputs:
                log_inputs(store, run_id, inputs)
            for path in artifacts:
                upload(store, run_id, path)
            for child in (child for child in children if find_run(store, child) is not None):
                store.client.set_tag(child, PARENT_TAG, run_id)
            store.client.set_terminated(run_id, "FINISHED")
        except BaseException:
            if run_id:
                store.client.set_terminated(run_id, "FAILED")
            raise
    return run_id


def _log_numbers(store: Store, run_id: str, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    entries = [Param(key, redact(str(value))[:_PARAM_LENGTH]) for key, value in params.items()]
    for start in range(0, len(entries), _BATCH):
        store.client.log_batch(run_id, params=entries[start : start + _BATCH])
    points = [Metric(key, float(value), now, 0) for key, value in metrics.items()]
    for start in range(0, len(points), _BATCH):
        store.client.log_batch(run_id, metrics=points[start : start + _BATCH])


def log_evaluation_once(
    record: Path, *, metrics: Mapping[str, float], uri: str | None, root: str | Path, experiment: str, **run: Any
) -> tuple[str, bool]:
    """``log_evaluation`` unless ``record`` says that these metrics were logged there before: a job that is started
    again when it is finished is not logged twice.

    Args:
        record: JSON file that keeps the run's id, and of what.

    Returns:
        The run's id, and whether it was logged before.

    Raises:
        InputError: as ``log_evaluation``.
    """
    where = [uri, str(Path(root).resolve()), experiment]
    digest = hashlib.sha256(json.dumps([dict(metrics), where], sort_keys=True).encode()).hexdigest()
    with suppress(OSError, ValueError, KeyError, TypeError):  # not there, or damaged: logged anew
        logged = parse_json(record.read_text(encoding="utf-8"))
        if logged["digest"] == digest:
            return str(logged["run_id"]), True
    run_id = log_evaluation(metrics=metrics, uri=uri, root=root, experiment=experiment, **run)
    remedy = f"free some space; everything is written and logged as MLflow run {run_id}"
    write_atomic(record, json.dumps({"digest": digest, "run_id": run_id}).encode(), remedy)
    return run_id, False
