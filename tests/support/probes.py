"""A small probe of an encoder's folder, and the tags of its MLflow run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from ca2cl.config import TrackingConfig
from ca2cl.evaluation.probe.run import ProbeConfig
from ca2cl.evaluation.probe.run import run as probe


def run_probe(place: Path, folder: Path, *tests: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The JSON and the MLflow run's tags."""
    config = ProbeConfig(
        encoder=str(place / "encoder"), train=str(place / "train"), test=tuple(str(place / name) for name in tests),
        labels=(1.0,), seeds=1, classifiers=("knn",), floors=False, workers=0, output=str(folder / "probe.json"),
        tracking=TrackingConfig(root=str(folder / "store")),
    )  # fmt: skip
    assert probe(config) == 0
    client = MlflowClient(f"sqlite:///{folder}/store/mlflow.db")
    experiment = client.get_experiment_by_name("ca2cl")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], max_results=1)
    return json.loads((folder / "probe.json").read_text()), run.data.tags
