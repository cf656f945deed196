"""Progress lines of a training that is not on a terminal: how often, and what they say."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ca2cl.config import DataConfig, RunConfig, TrackingConfig
from ca2cl.methods.simclr import SimCLR
from ca2cl.pretrain import callbacks
from ca2cl.pretrain.callbacks import RunObserver
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import RunTracker


class Clock:
    """Seconds that pass only where a test says so."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Silent(RunTracker):
    """A run without a folder or a store; it is logged nowhere."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder

    @property
    def run_id(self) -> str | None:
        return None

    def log_step(self, record: dict[str, Any]) -> None: ...

    def await_run(self) -> None: ...


def lines(folder: Path, steps: int, seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> list[str]:
    """Lines of a training of ``steps`` steps of ``seconds`` each; the first takes ten times as long."""
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    (folder / "journal.jsonl").touch()
    config = PretrainConfig(
        data=DataConfig(shards="s"), run=RunConfig(batch_size=64, steps=steps, output_dir=str(folder)),
        tracking=TrackingConfig(root=str(folder)),
    )  # fmt: skip
    order: Any = type("Order", (), {"steps_per_epoch": 100})
    nothing: Any = None
    observer = RunObserver(Silent(folder), config, SimCLR(), nothing, nothing, order, steps, {})
    with caplog.at_level(logging.INFO):
        for step in range(1, steps + 1):
            took = seconds * (10 if step == 1 else 1)
            clock.now += took
            observer.log_step({"step": step, "epoch": 0, "loss": 5.0, "lr": 0.1, "tiles_per_s": 64 / took})
    return [line for line in caplog.messages if line.startswith("step ")]


def test_a_short_training_has_its_first_and_its_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert lines(tmp_path, 50, 0.01, monkeypatch, caplog) == [
        "step 1 of 50, epoch 0: NT-Xent 5.000 (chance 4.84); lr 1.00e-01, 640 tiles/s, 4.9 s left",
        "step 50 of 50, epoch 0: NT-Xent 5.000 (chance 4.84); lr 1.00e-01, 6400 tiles/s, 0 s left",
    ]


def test_a_long_training_has_ever_fewer_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = lines(tmp_path, 20_000, 2.0, monkeypatch, caplog)
    at = [int(line.split()[1]) for line in found]
    gaps = [2.0 * (later - one) for one, later in zip(at, at[1:], strict=False)]
    assert min(gaps[:-1]) >= 10 and max(gaps) <= 602 and gaps[5] <= 12 and gaps[-2] >= 600
    assert gaps[:-1] == sorted(gaps[:-1]) and len(found) < 200, "11 hours"
    assert found[1].endswith(" left") and "11 h" in found[1], "the first, slow step does not count"
