"""Every test runs with one intra-op thread and away from the user's own MLflow."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # tiles of the tests lie there, GPU or not
    torch.set_num_threads(1)
    yield
