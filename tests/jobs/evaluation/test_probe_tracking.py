"""Evaluations as MLflow runs of their own, in a real store."""

from __future__ import annotations

from pathlib import Path

import pytest

from ca2cl.errors import InputError
from ca2cl.registry.evaluation_run import SOURCE_RUN_TAG, log_evaluation
from ca2cl.store.open import open_store


def test_an_evaluation_becomes_a_run_that_names_its_source(tmp_path: Path) -> None:
    note = tmp_path / "probe.json"
    note.write_text("{}")
    metrics = {f"encoder/linear/{n}pct/accuracy": n / 200 for n in range(1, 151)}  # more than one request holds
    run_id = log_evaluation(
        source_run_id="abc",
        name="probe",
        params={"knn": 20, "train": "https://user:secret@host/x"},
        metrics=metrics,
        artifacts=[note],
        tags={"ca2cl.test_digest": "d"},
        root=tmp_path / "runs",
    )
    run = open_store(None, tmp_path / "runs").client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags[SOURCE_RUN_TAG] == "abc" and run.data.tags["ca2cl.test_digest"] == "d"
    assert run.data.params["knn"] == "20" and "secret" not in run.data.params["train"]
    assert run.data.metrics["encoder/linear/10pct/accuracy"] == 0.05
    assert len(run.data.metrics) == len(metrics)
    files = open_store(None, tmp_path / "runs").client.list_artifacts(run_id)
    assert [entry.path for entry in files] == ["probe.json"]


def test_an_evaluation_that_cannot_be_logged_ends_failed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be used"):
        log_evaluation(
            source_run_id=None, name="x", params={}, metrics={}, artifacts=[tmp_path / "none"], root=tmp_path / "runs"
        )
    store = open_store(None, tmp_path / "runs")
    runs = store.client.search_runs([store.experiment_id("ca2cl")])
    assert [run.info.status for run in runs] == ["FAILED"]
