"""`bitwise` fixes and remembers what its promise needs, with nobody setting threads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ca2cl.errors import InputError
from ca2cl.pretrain.numerics import check_numerics, fix_numerics
from tests.support.jobs import as_printed, make_shards, training_lines
from tests.support.ports import free_port

JOB = (
    "-m ca2cl pretrain --recipe smoke --data.shards shards-0 --tracking.register_as null --run.accumulation bitwise "
    "--model.norm lane_group --model.norm_group 2 --run.batch_size 32"
)


def test_threads_are_fixed_and_another_place_is_refused() -> None:
    torch.set_num_threads(2)
    here = fix_numerics(torch.device("cpu"))
    assert torch.get_num_threads() == 1 and here["threads"] == "1"
    assert here["torch"] == torch.__version__ and here["kernels"] == torch.backends.cpu.get_cpu_capability()
    check_numerics(here, dict(here), "on rank 1")
    with pytest.raises(InputError, match="threads is '1' here and '2' on rank 1"):
        check_numerics(here, {**here, "threads": "2"}, "on rank 1")
    with pytest.raises(InputError, match="MKL_CBWR is 'not set' here and 'AVX2' in step-1"):
        check_numerics(here, {**here, "MKL_CBWR": "AVX2"}, "in step-1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("numerics")
    make_shards(folder, 10)
    return folder


def one_and(folder: Path, processes: int, steps: int) -> list[Path]:
    """Run folders of a bare process and of launched ones, in an environment where nobody sets threads."""
    config = f"--config_file accelerate_configs/cpu.yaml --main_process_port {free_port()}"
    starts = {"bare": "python", "launched": f"accelerate launch {config} --num_processes {processes}"}
    for name, how in starts.items():
        done = as_printed(f"{how} {JOB} --run.steps {steps} --run.output_dir {name}-{processes}", folder)
        assert done.returncode == 0, done.stderr
    return [folder / f"{name}-{processes}" for name in starts]


def compare(bare: Path, launched: Path, steps: int) -> None:
    """Losses and weights, to the last bit."""
    lines = [training_lines(run) for run in (bare, launched)]
    assert len(lines[0]) == steps
    for ours, theirs in zip(*lines, strict=True):
        assert ours["loss"] == theirs["loss"], ours["step"]
    one, other = (
        load_file(run / "checkpoints" / f"step-{steps:09d}" / "model.safetensors") for run in (bare, launched)
    )
    assert one and all(torch.equal(other[name], value) for name, value in one.items())


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: a bare process has one thread anyway")
def test_a_bare_process_gives_the_bits_of_launched_ones_and_others_do_not_go_on(folder: Path) -> None:
    bare, launched = one_and(folder, 2, 2)
    compare(bare, launched, 2)
    state = bare / "checkpoints" / "step-000000002" / "state.json"
    assert json.loads(state.read_text())["numerics"]["threads"] == "1"
    again = f"python {JOB} --run.steps 3 --run.output_dir other --run.resume {state.parent.relative_to(folder)}"
    done = as_printed(again, folder, ATEN_CPU_CAPABILITY="default")  # other kernels
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ca2cl: error")]
    assert done.returncode == 2 and "kernels is 'DEFAULT' here" in line and "--run.accumulation exact" in line


@pytest.mark.slow
def test_four_launched_processes_give_the_bits_of_a_bare_one(folder: Path) -> None:
    compare(*one_and(folder, 4, 8), 8)
