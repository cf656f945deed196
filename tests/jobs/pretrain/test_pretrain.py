"""Pre-training as users start it: end to end, on one and two processes, interrupted and resumed."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ca2cl.common.job_dir import JobDir
from tests.support.jobs import Ranks, make_shards, pretrain, training_lines

FULL = ("--recipe", "smoke", "--objective.adversary", "true", "--tracking.register_as", "null")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pretrain"), 10)


def weights(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


def test_two_processes_give_the_losses_of_one(shards: Path, tmp_path: Path) -> None:
    for processes in (1, 2):
        done = pretrain(
            tmp_path, *FULL, "--data.shards", str(shards), "--run.output_dir", f"run{processes}", "--run.steps", "3",
            "--model.norm", "frozen", processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two = (training_lines(tmp_path / f"run{n}") for n in (1, 2))
    assert [line["step"] for line in one] == [line["step"] for line in two] == [1, 2, 3]
    for name in ("loss", "nt_xent", "cluster", "nt_xent_adversarial"):
        for a, b in zip(one, two, strict=True):
            assert math.isfinite(a[name])
            assert a[name] == pytest.approx(b[name], rel=1e-5), (name, a["step"])


def test_synchronised_statistics_are_those_of_one_process(shards: Path, tmp_path: Path) -> None:
    """One step: batch statistics of so few tiles amplify rounding (``test_distributed_step`` has it in double)."""
    for processes in (1, 2):
        done = pretrain(
            tmp_path, *FULL, "--data.shards", str(shards), "--run.output_dir", f"run{processes}", "--run.steps", "1",
            processes=processes,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (one,), (two,) = (training_lines(tmp_path / f"run{n}") for n in (1, 2))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    expected, found = (weights(tmp_path / f"run{n}", 1) for n in (1, 2))
    for name in (name for name in expected if "running" in name):
        torch.testing.assert_close(expected[name], found[name], rtol=1e-4, atol=1e-5)


def test_a_run_that_goes_on_ends_with_the_same_weights(shards: Path, tmp_path: Path) -> None:
    common = (*FULL, "--data.shards", str(shards), "--run.checkpoint_every", "2", "--optim.schedule", "constant")
    whole = pretrain(tmp_path, *common, "--run.output_dir", "whole", "--run.steps", "4")
    first = pretrain(tmp_path, *common, "--run.output_dir", "parts", "--run.steps", "2")
    second = pretrain(tmp_path, *common, "--run.output_dir", "parts", "--run.steps", "4")
    for done in (whole, first, second):
        assert done.returncode == 0, done.stderr
    expected, found = weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert [line["step"] for line in training_lines(tmp_path / "parts")] == [1, 2, 3, 4]
    state = json.loads((tmp_path / "parts" / "checkpoints" / "step-000000004" / "state.json").read_text())
    assert state["run_id"] == json.loads((tmp_path / "parts" / "run.json").read_text())["run_id"]


def test_a_job_that_is_started_again_waits_for_the_checkpoint_of_the_one_before(shards: Path, tmp_path: Path) -> None:
    """Requeued while its last processes are still writing: the checkpoint is looked for when they are through."""
    job = (
        "--recipe",
        "smoke",
        "--tracking.register_as",
        "null",
        "--data.shards",
        str(shards),
        "--run.output_dir",
        "run",
        "--optim.schedule",
        "constant",  # so that more steps are the same run
    )
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    assert pretrain(tmp_path, *job, "--run.steps", "2").returncode == 0
    with JobDir(run).locked():
        checkpoints.rename(tmp_path / "not yet")
        ranks = Ranks(tmp_path, *job, "--run.steps", "4", processes=2)
        while "another job is writing here; waiting for it" not in ranks.started[0].stderr():
            assert ranks.started[0].poll() is None, ranks.started[0].stderr()
            time.sleep(0.05)
        (tmp_path / "not yet").rename(checkpoints)
    assert [code for code, _ in ranks.wait()] == [0, 0]
    assert [line["step"] for line in training_lines(run)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run.bach_size", "3"), "unknown setting run.bach_size: did you mean run.batch_size?"),
        (("--run.steps", "null"), "give exactly one of them"),
        (("--run.batch_size", "8"), "use --run.batch_size 16, or --objective.clusters 8"),
        (("--model.weights", "no/such/file.safetensors"), "no/such/file.safetensors"),
        (("--data.shards", "nowhere"), "nowhere/manifest.json: no manifest here"),
        (("--run.batch_size", "128"), "run.batch_size is 128"),
        (("--run.micro_batch_size", "12"), "32 tiles of a batch, which it must divide; use --run.micro_batch_size 8"),
        (("--run.micro_batch_size", "16", "--run.accumulation", "bitwise", "--model.norm", "sync"), "would not give"),
        (("--run.micro_batch_size", "16"), "or --run.accumulation plain"),
        (("--model.norm", "lane_group", "--model.norm_group", "12"), "blocks of 4 groups, 48 tiles"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    from ca2cl.cli import main

    monkeypatch.chdir(tmp_path)
    code = main(["pretrain", *FULL, "--data.shards", str(shards), "--run.output_dir", "run", *arguments])
    error = capfd.readouterr().err.splitlines()
    assert code == 2
    assert len(error) == 1 and error[0].startswith("ca2cl: error: ") and message in error[0], error
    assert not (tmp_path / "run").exists()
