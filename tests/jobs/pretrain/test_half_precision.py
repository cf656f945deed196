"""An overflow on one rank, in fp16 with its loss scaling or in fp32, leaves the step out on all, and nothing behind."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import overflow_job
from tests.support.forked import on_ranks
from tests.support.jobs import CONFIGS, LAUNCH, start
from tests.support.ports import free_port

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


def run(folder: Path, config: str, precision: str, *steps: str) -> dict[str, Any]:
    out = folder / "out.json"
    if config == "cpu":
        on_ranks(overflow_job.on_rank, 2, out, precision, steps)
    else:
        command = [
            *LAUNCH, "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_machines", "1", "--num_processes", "2",
            "--main_process_port", str(free_port()), "--dynamo_backend", "no", "-m", "tests.support.overflow_job",
            str(out), precision, *steps,
        ]  # fmt: skip
        done = start(command, folder, DS_ACCELERATOR="cpu")
        assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ("cpu", "fp16"),
        pytest.param("cpu", "no", marks=pytest.mark.slow),
        pytest.param("deepspeed_zero1", "fp16", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero2", "fp16", marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero2", "no", marks=[needs_deepspeed, pytest.mark.slow]),
    ],
)
def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(tmp_path: Path, config: str, precision: str) -> None:
    """Steps 1, 2 (overflows), 3 end with the weights of steps 1, 3 at the lower scale."""
    found = run(tmp_path, config, precision, "1", "2!", "3")
    for step in found["steps"]:
        for name in ("loss", "skipped", "scale", "digest"):
            assert step[0][name] == step[1][name], name  # the ranks agree
    first, second, third = (step[0] for step in found["steps"])
    assert [step["skipped"] for step in (first, second, third)] == [False, True, False]
    assert first["moved"] and not second["moved"] and third["moved"]
    assert second["digest"] == first["digest"] and math.isfinite(third["digest"]) and math.isfinite(third["norm"])
    assert third["scale"] == (first["scale"] / 2 if precision == "fp16" else 1)
    expected = run(tmp_path, config, precision, "1", "3")
    start, end, there = (np.array(values) for values in (found["start"], found["end"], expected["end"]))
    # fp16 rounds otherwise at another scale, where numbers are below its smallest normal one
    assert np.linalg.norm(end - there) < 0.02 * np.linalg.norm(there - start)
