"""Whole runs with layer decay, frozen layers, drop path and a moving average: one result on every engine."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ca2cl.cli import main
from ca2cl.config import ModelConfig, OptimConfig, RunConfig
from ca2cl.models.encoder_io import load_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.start import _warn_of_the_start
from tests.support.jobs import Ranks, make_shards, pretrain, training_lines

JOB = (
    "--recipe", "smoke", "--tracking.register_as", "null", "--run.steps", "3", "--run.batch_size", "32",
    "--run.accumulation", "bitwise", "--model.norm_group", "2", "--optim.schedule", "constant",
    "--model.arch", "timm:test_vit", "--model.drop_path", "0.3", "--model.checkpoint_activations", "true",
    "--optim.name", "adamw", "--optim.lr", "1e-3", "--optim.weight_decay", "0.05", "--optim.layer_decay", "0.8",
    "--optim.decay_all", "false", "--optim.freeze_layers", "2", "--optim.freeze_steps", "2", "--optim.ema", "0.9",
)  # fmt: skip
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
FILES = ("model", "ema", "optimizer")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("tuned"), 15)


def run(shards: Path, folder: Path, *more: str, processes: int = 1, config: str | None = None) -> Path:
    done = pretrain(
        folder, *JOB, "--data.shards", str(shards), "--run.output_dir", "run", *more, processes=processes, config=config
    )
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process that holds every batch at once, and keeps all activations."""
    folder = tmp_path_factory.mktemp("one")
    return run(shards, folder, "--model.checkpoint_activations", "false", "--run.checkpoint_every", "1",
               "--run.keep_last", "9")  # fmt: skip


def same(ours: Path, theirs: Path, step: int = 3) -> None:
    """Every bit of weights, average and optimizer state; the losses are sums of double precision."""
    for a, b in zip(training_lines(ours)[:step], training_lines(theirs)[:step], strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-14)
    for file in FILES:
        first, second = (
            load_file(one / "checkpoints" / f"step-{step:09d}" / f"{file}.safetensors") for one in (ours, theirs)
        )
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert torch.equal(second[name], value), (file, name)


@pytest.mark.parametrize(
    ("config", "processes", "micro_batch"),
    [
        pytest.param(None, 1, 16, marks=pytest.mark.slow),
        pytest.param(None, 2, 16, marks=pytest.mark.slow),
        pytest.param(None, 2, 8, marks=pytest.mark.slow),
        pytest.param("deepspeed_zero1", 1, 32, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero1", 1, 16, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero1", 2, 16, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero1", 2, 8, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero2", 2, 8, marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_every_engine_gives_the_run_of_one_process(
    shards: Path, expected: Path, tmp_path: Path, config: str | None, processes: int, micro_batch: int
) -> None:
    found = run(
        shards, tmp_path, "--run.micro_batch_size", str(micro_batch), processes=processes, config=config,
    )  # fmt: skip
    same(expected, found)


def test_the_average_is_handed_on_and_frozen_layers_wait(expected: Path) -> None:
    states = [
        [load_file(expected / "checkpoints" / f"step-{step:09d}" / f"{file}.safetensors") for file in ("model", "ema")]
        for step in (1, 2, 3)
    ]
    (first, _), (second, before), (last, average) = states
    for name, value in last.items():
        frozen = "blocks.0." in name or "blocks.1." in name or name.split(".")[1] in ("cls_token", "pos_embed")
        frozen = frozen or "patch_embed" in name
        assert torch.equal(first[name], second[name]) == frozen, name
        assert not torch.equal(second[name], value), name
        torch.testing.assert_close(average[name], before[name] + 0.1 * (value - before[name]), rtol=0, atol=1e-7)
    encoder, card = load_encoder(expected / "encoder")
    assert card.weights == "ema 0.9" and card.step == 3
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, average[f"encoder.{name}"]), name


@needs_deepspeed
@pytest.mark.parametrize(
    "engines",
    [
        pytest.param((("deepspeed_zero2", 2), (None, 1)), marks=pytest.mark.slow),
        pytest.param(((None, 2), ("deepspeed_zero1", 2)), marks=pytest.mark.slow),
        pytest.param((("deepspeed_zero1", 1), ("deepspeed_zero2", 2)), marks=pytest.mark.slow),
    ],
)
def test_groups_and_average_go_from_one_engine_to_another(
    shards: Path, expected: Path, tmp_path: Path, engines: tuple[tuple[str | None, int], ...]
) -> None:
    """Stopped while layers are frozen, and resumed on another number of processes."""
    for steps, (config, processes) in zip((1, 3), engines, strict=True):
        found = run(shards, tmp_path, "--run.steps", str(steps), processes=processes, config=config)
    same(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "bitwise"])
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(shards: Path, tmp_path: Path, kind: str) -> None:
    """By SIGTERM on two processes, while first layers are frozen and after: weights, average and optimizer state."""
    steps = 40
    more = ("--run.steps", str(steps), "--optim.freeze_steps", "20", "--run.accumulation", kind)
    arguments = (*JOB, *more, "--data.shards", str(shards), "--run.output_dir")
    whole = Ranks(tmp_path, *arguments, "whole", processes=2)
    assert [code for code, _ in whole.wait()] == [0, 0]
    stops = []
    for least in (1, 21):
        stopped = Ranks(tmp_path, *arguments, "stopped", processes=2)
        journal, deadline = tmp_path / "stopped" / "journal.jsonl", time.monotonic() + 200
        while not (journal.exists() and len(training_lines(tmp_path / "stopped")) >= least):
            assert time.monotonic() < deadline, stopped.wait(1)
            time.sleep(0.02)
        stopped.started[1].send_signal(signal.SIGTERM)
        assert [code for code, _ in stopped.wait()] == [85, 85]
        stops.append(len(training_lines(tmp_path / "stopped")))
    assert 1 <= stops[0] < 20 < stops[1] < steps, stops
    again = Ranks(tmp_path, *arguments, "stopped", processes=2)
    assert [code for code, _ in again.wait()] == [0, 0]
    same(tmp_path / "whole", tmp_path / "stopped", steps)
    ours, theirs = (load_encoder(tmp_path / name / "encoder")[0].state_dict() for name in ("whole", "stopped"))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())


@pytest.mark.parametrize("older", [False, True])
def test_settings_that_change_the_result_may_not_change_on_resume(
    shards: Path, expected: Path, tmp_path: Path, older: bool
) -> None:
    """An older version's run did not record them, and had none of them."""
    shutil.copytree(expected, tmp_path / "run")
    changes = {"optim.ema": "0.99", "model.drop_path": "0.2", "optim.layer_decay": "0.7"}
    if older:
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        record["params"] = {name: value for name, value in record["params"].items() if name not in changes}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    words = [word for name, value in changes.items() for word in (f"--{name}", value)]
    done = pretrain(tmp_path, *JOB, "--data.shards", str(shards), "--run.output_dir", "run", *words)
    before = ("None", "0.0", "None") if older else ("0.9", "0.3", "0.8")
    assert done.returncode == 2
    for was, (name, value) in zip(before, changes.items(), strict=True):
        assert f"{name} {was} -> {value}" in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.parametrize("recipe", ["continue_vit_small", "continue_resnet50"])
def test_a_recipe_that_continues_needs_weights(
    shards: Path, tmp_path: Path, recipe: str, capfd: pytest.CaptureFixture[str]
) -> None:
    where = ("--data.shards", str(shards), "--run.output_dir", str(tmp_path / "run"))
    assert main(["pretrain", "--recipe", recipe, *where]) == 2
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and "model.weights is not set" in told[0] and "--model.weights WEIGHTS" in told[0]
    assert not (tmp_path / "run").exists()


def test_an_unfit_start_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    optim = OptimConfig(layer_decay=0.8, ema=0.999)
    _warn_of_the_start(PretrainConfig(optim=optim, run=RunConfig(batch_size=64, steps=100)))
    assert "model.weights is random, and optim.layer_decay" in caplog.text
    assert "100 steps are few for an average of about 1000" in caplog.text
    caplog.clear()
    given = ModelConfig(weights="torchvision:IMAGENET1K_V1")
    _warn_of_the_start(PretrainConfig(model=given, optim=optim, run=RunConfig(batch_size=64, steps=5000)))
    assert not caplog.text
