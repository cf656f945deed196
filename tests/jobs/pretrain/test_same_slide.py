"""Same-slide negatives on any number of processes and micro-batches: steps in double precision, and whole runs."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as run_shard
from ca2cl.data.synthetic.tissue import write_tissue
from ca2cl.models.backbone import build_encoder
from tests.jobs.pretrain.test_distributed_step import (
    SLIDES,
    DoubleNetwork,
    DoubleSimCLR,
    compare,
    micro_batches,
    on_processes,
    one_step,
)
from tests.support import step_oracle
from tests.support.jobs import pretrain, training_lines

WEIGHTED = ObjectiveConfig(clusters=3, epsilon=0.3, same_slide_weight=0.3)
MASKED = ObjectiveConfig(clusters=3, epsilon=0.3, same_slide_weight=0.0)
slow = pytest.mark.slow


def found_on(world: int, network: Any, count: int, objective: ObjectiveConfig, folder: Path, kind: str) -> Any:
    if world == 1:
        return one_step(network, 0, 1, count, objective, kind)
    return on_processes(world, network, count, objective, folder, kind)


def as_oracle(network: Any, objective: ObjectiveConfig) -> dict[str, Tensor]:
    (whole,) = micro_batches(0, 1, 1)
    canonical = torch.argsort(whole.positions)
    return step_oracle.gradients(network, whole.x1[canonical], whole.x2[canonical], objective, SLIDES.tolist())


@pytest.mark.parametrize(
    ("world", "count", "kind", "objective"),
    [
        (1, 1, "exact", WEIGHTED),
        (1, 1, "exact", MASKED),
        (1, 2, "exact", WEIGHTED),
        (1, 2, "bitwise", WEIGHTED),
        (2, 2, "exact", WEIGHTED),
        pytest.param(2, 1, "exact", WEIGHTED, marks=slow),
        pytest.param(2, 1, "bitwise", WEIGHTED, marks=slow),
        pytest.param(2, 2, "bitwise", MASKED, marks=slow),
    ],
)
def test_the_gradient_is_that_of_slow_loops(
    world: int, count: int, kind: str, objective: ObjectiveConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = DoubleNetwork(build_encoder("timm:test_vit", image_size=32)).double().train()
    expected = as_oracle(network, objective)
    found = found_on(world, network, count, objective, tmp_path, kind)
    sizes = torch.bincount(SLIDES + 2)
    share = float((sizes * (sizes - 1)).sum()) / (16 * 15)
    assert float(found["term same_slide_negatives"]) == pytest.approx(share, rel=1e-12)
    assert found.get("term anchors_without_negatives", 0) == 0
    compare(expected, found)
    plain = as_oracle(network, ObjectiveConfig(clusters=3, epsilon=0.3))
    assert any(float((plain[n] - expected[n]).norm() / expected[n].norm()) > 1e-3 for n in expected)


@pytest.mark.parametrize(
    ("world", "count", "kind"), [(1, 2, "exact"), pytest.param(2, 2, "exact", marks=slow), (1, 2, "bitwise")]
)
def test_simclr_is_as_exact(world: int, count: int, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DoubleSimCLR(build_encoder("timm:test_vit", image_size=32), 16).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, WEIGHTED)
    found = found_on(world, network, count, WEIGHTED, tmp_path, kind)
    assert found.keys() == expected.keys() and "term same_slide_negatives" in found
    compare(expected, found)


JOB = (
    "--recipe", "smoke", "--data.lanes", "8", "--objective.clusters", "4", "--tracking.register_as", "null",
    "--run.batch_size", "32", "--model.norm", "lane_group", "--model.norm_group", "2", "--data.workers", "0",
    "--run.accumulation", "bitwise", "--optim.schedule", "constant", "--run.figures_every", "0",
    "--objective.same_slide_weight", "0.3", "--data.max_per_slide", "2",
)  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides are the first letters of the tiles' names."""
    folder = tmp_path_factory.mktemp("slides")
    tissue = write_tissue(folder / "tissue", 10, size=48, seed=0)
    out = folder / "shards"
    run_shard(ShardConfig(source=str(tissue), out=str(out), samples_per_shard=20, workers=1, group_pattern="-([A-Z])"))
    return out


def weights(run: Path, step: int = 3) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


@slow
@pytest.mark.parametrize(("processes", "micro"), [(2, 8), (1, 8), (2, 16)])
def test_a_run_is_the_same_on_any_hardware_and_goes_on(
    shards: Path, tmp_path: Path, processes: int, micro: int
) -> None:
    """Bit by bit; the second one stops after two of three steps, which are more than an epoch."""
    data = ("--data.shards", str(shards))
    whole = pretrain(tmp_path, *JOB, *data, "--run.output_dir", "whole", "--run.steps", "3")
    assert whole.returncode == 0, whole.stderr
    assert re.search(r"data.max_per_slide 2: \d+ of 2\d slides .* 2 steps of an epoch; 26 of 90 tiles", whole.stderr)
    for steps in ("2", "3"):
        parts = pretrain(
            tmp_path, *JOB, *data, "--run.output_dir", "parts", "--run.steps", steps,
            "--run.micro_batch_size", str(micro), processes=processes,
        )  # fmt: skip
        assert parts.returncode == 0, parts.stderr
    lines = training_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(0 < line["same_slide_negatives"] <= 1 / 31 for line in lines)
    for a, b in zip(lines, training_lines(tmp_path / "parts"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-14)
    expected, found = (weights(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
