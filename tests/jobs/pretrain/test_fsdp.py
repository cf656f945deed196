"""FSDP2 on real gloo processes: gradients in double precision, optimizer steps, checkpoints, jobs."""

import importlib.util
import itertools
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.growth import GATHERS, REDUCTIONS
from ca2cl.config import ObjectiveConfig, OptimConfig, RunConfig
from ca2cl.errors import InputError
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.engines import check_fsdp
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.fsdp import FsdpEngine, blocks, shard
from ca2cl.training.optim import build_optimizer
from tests.jobs.pretrain.test_distributed_step import (
    ALONE,
    CLEAN,
    GROUP,
    WHOLE,
    DoubleNetwork,
    compare,
    micro_batches,
    one_step,
)
from tests.support.forked import on_ranks
from tests.support.jobs import Ranks, make_shards, pretrain, training_lines

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
RELATIVE = ObjectiveConfig(clusters=3, epsilon=0.3, epsilon_mode="relative")
Case = tuple[str, str, int, ObjectiveConfig]
"""Body, normalisation, micro-batches and loss."""


def body(name: str, norm: Any = "sync") -> nn.Module:
    torch.manual_seed(0)
    return DoubleNetwork(build_encoder(name, norm, group=GROUP, image_size=32)).double().train()


class SentBytes(TorchDispatchMode):
    """Counts the bytes of whole tensors that FSDP2 gathers and reduces."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes
        if func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes
        return func(*args, **(kwargs or {}))


def steps(rank: int, world: int, cases: list[Case], out: str) -> None:
    accelerator, found = build_accelerator(), []
    for name, norm, count, objective in cases:
        network = shard(body(name, norm), accelerator.device)
        engine = FsdpEngine(accelerator, network, build_optimizer(OptimConfig(), network))
        with SentBytes() as sent:
            terms = CA2CL(objective).step(engine, micro_batches(rank, world, count))
        if objective.adversary:
            size = sum(p.nbytes for p in network.parameters())
            assert sent.gathered == pytest.approx(GATHERS * count * size, rel=0.03)
            assert sent.reduced == pytest.approx(REDUCTIONS * count * size, rel=0.03)
        grads = {name: engine.whole(p.grad) for name, p in network.named_parameters() if p.grad is not None}
        assert all(p.grad is None or len(p.grad.to_local()) < len(p) for p in network.parameters() if len(p) > 1)
        buffers = {name: b for name, b in network.named_buffers() if "running" in name}
        found.append({**{f"term {k}": v for k, v in terms.items()}, **grads, **buffers})
    if rank == 0:
        torch.save(found, out)
    accelerator.end_training()


def check_gradients(world: int, cases: list[Case], folder: Path) -> None:
    """Each case's terms, gradients and running statistics are those of one process that sees the whole batch."""
    on_ranks(steps, world, world, cases, str(folder / "found.pt"))
    for (name, norm, count, objective), found in zip(cases, torch.load(folder / "found.pt"), strict=True):
        expected = one_step(body(name, norm), 0, 1, 1, objective)
        assert found.keys() == expected.keys() and expected["term skipped_adversaries"] == 0, (name, norm, count)
        compare(expected, found)


def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    vit = ("timm/test_vit", "sync")
    check_gradients(2, [(*vit, 1, WHOLE), (*vit, 2, RELATIVE), (*vit, 2, CLEAN)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_of_more_bodies_and_settings(world: int, tmp_path: Path) -> None:
    bodies = [("timm/test_vit", "sync"), ("resnet18", "lane_group"), ("resnet18", "frozen")]
    counts = [1] if world == 4 else [1, 2]
    cases = [(*one, *other) for one in bodies for other in itertools.product(counts, [WHOLE, CLEAN, ALONE])]
    check_gradients(world, [*cases, ("resnet18", "sync", 1, WHOLE)], tmp_path)


@pytest.mark.parametrize(
    ("name", "number", "kind"),
    [
        ("resnet18", 8, "BasicBlock"),
        ("timm/vit_tiny_patch16_224", 12, "Block"),
        ("timm/swin_tiny_patch4_window7_224", 12, "SwinTransformerBlock"),
        ("timm/convnext_atto", 12, "ConvNeXtBlock"),
    ],
)
def test_blocks_are_those_of_the_body(name: str, number: int, kind: str) -> None:
    with torch.device("meta"):
        found = blocks(build_encoder(name))
    assert [type(module).__name__ for module in found] == [kind] * number


OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "adam": ("adam", "no"), "adamw": ("adamw", "no"), "sgd": ("sgd", "no"), "fp16": ("adamw", "fp16"),
}  # fmt: skip
"""Name and precision."""


def little_engine(accelerator: Any, kind: str, *, sharded: bool = False, seed: int = 0) -> AccelerateEngine:
    """An engine of a block and a head, whose rows no number of processes divides."""
    name, precision = OPTIMIZERS[kind]
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh())
    network: nn.Module = nn.Sequential(nn.Sequential(block, nn.Tanh()), nn.Linear(7, 1)).double().eval()
    if sharded:
        network = shard(network, accelerator.device)
    optimizer = build_optimizer(OptimConfig(name=name, weight_decay=0.1), network)
    return (FsdpEngine if sharded else AccelerateEngine)(accelerator, network, optimizer, precision)


def train(engine: AccelerateEngine, numbers: range, rank: int = 0, world: int = 1) -> list[tuple[float, float]]:
    """Steps of a regression: number 4 is dropped and done again, number 5 has an infinite gradient.

    Returns:
        Norm of the gradient, -1 where it is infinite, and loss scale of each.
    """
    found = []
    for number in numbers:
        x = torch.randn(12, 3, generator=torch.Generator().manual_seed(number), dtype=torch.float64)[rank::world]
        for _ in range(2 if number == 4 else 1):
            engine.drop_step()
            engine.keep_buffers()
            loss = (engine.network(x) - x.sum(1, keepdim=True)).square().sum() / 12
            engine.backward(loss * (float("inf") if number == 5 and rank == world - 1 else 1.0))
        outcome = engine.optimizer_step(0.05, 0.5)
        assert bool(outcome.skipped) == (number == 5)
        found.append((-1.0 if outcome.skipped else float(outcome.grad_norm), float(engine.loss_scale)))
    return found


def go_on(rank: int, world: int, folder: str) -> None:
    """Go on from the checkpoint of one process, and write one."""
    accelerator, outcomes = build_accelerator(), {}
    for kind in OPTIMIZERS:
        engine, path = little_engine(accelerator, kind, sharded=True, seed=1), Path(folder, kind)
        restore(path / "one" / "step-000000003", engine)
        Checkpointer(path / "again", 1).save(3, engine, {})
        outcomes[kind] = train(engine, range(3, 7), rank, world)
        Checkpointer(path / "sharded", 1).save(7, engine, {})
    torch.save(outcomes, Path(folder, f"{rank}.pt"))
    accelerator.end_training()


def test_steps_and_checkpoints_are_those_of_one_process(tmp_path: Path) -> None:
    """Byte for byte: a checkpoint that one process wrote and three read and wrote again, and the way back."""
    accelerator, expected = build_accelerator(), {}
    for kind in OPTIMIZERS:
        engine = little_engine(accelerator, kind)
        train(engine, range(3))
        Checkpointer(tmp_path / kind / "one", 1).save(3, engine, {})
        expected[kind] = engine, train(engine, range(3, 7))
    on_ranks(go_on, 3, 3, str(tmp_path))
    outcomes = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert outcomes[0] == outcomes[1] == outcomes[2] != {}
    for kind, (whole, theirs) in expected.items():
        for ours, outcome in zip(outcomes[0][kind], theirs, strict=True):
            assert ours == pytest.approx(outcome, rel=1e-9), kind
        back = little_engine(accelerator, kind, seed=2)
        newest = tmp_path / kind / "sharded" / "step-000000007"
        restore(newest, back)
        Checkpointer(tmp_path / kind / "back", 1).save(7, back, {})
        for a, b in zip(whole.bare.state_dict().values(), back.bare.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for one, other, step in (("one", "again", 3), ("sharded", "back", 7)):
            for file in ("model.safetensors", "optimizer.safetensors"):
                paths = [tmp_path / kind / name / f"step-{step:09d}" / file for name in (one, other)]
                assert paths[0].read_bytes() == paths[1].read_bytes(), (kind, file)


JOB = (
    "--recipe", "smoke", "--tracking.register_as", "null", "--model.arch", "timm/test_vit", "--run.batch_size", "32",
    "--optim.schedule", "constant", "--run.checkpoint_every", "1", "--run.keep_last", "9",
)  # fmt: skip
FSDP = ("--run.fsdp", "true")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("fsdp"), 10)


def run(shards: Path, folder: Path, *arguments: str, processes: int, config: str | None = None) -> Any:
    return pretrain(
        folder, *JOB, "--data.shards", str(shards), "--run.output_dir", "run", *arguments, processes=processes,
        config=config,
    )  # fmt: skip


def test_a_job_checkpoints_and_hands_on_whole_weights(shards: Path, tmp_path: Path) -> None:
    done = run(shards, tmp_path, *FSDP, "--run.steps", "1", processes=2)
    assert done.returncode == 0, done.stderr
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000000001" / "model.safetensors")
    encoder = load_file(tmp_path / "run" / "encoder" / "encoder.safetensors")
    shapes = {name: value.shape for name, value in build_encoder("timm/test_vit", image_size=32).state_dict().items()}
    assert {name: value.shape for name, value in encoder.items()} == shapes
    assert all(torch.equal(saved[f"encoder.{name}"], value) for name, value in encoder.items())


@pytest.mark.slow
def test_a_run_goes_on_without_it_on_another_number_of_processes(shards: Path, tmp_path: Path) -> None:
    """Two steps of one run, the first sharded, are those of one process."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    for folder, arguments, processes in [
        (parts, (*FSDP, "--run.steps", "1"), 2),
        (parts, ("--run.steps", "2"), 1),
        (whole, ("--run.steps", "2"), 1),
    ]:
        folder.mkdir(exist_ok=True)
        done = run(shards, folder, *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
    close(whole / "run", parts / "run", 2)


def close(expected: Path, found: Path, steps: int) -> None:
    """Equal to fp32's rounding."""
    lines = [training_lines(run) for run in (expected, found)]
    assert len(lines[0]) == len(lines[1]) == steps
    for a, b in zip(*lines, strict=True):
        for name in ("loss", "nt_xent", "cluster", "nt_xent_adversarial", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])
    ours, theirs = (
        load_file(run / "checkpoints" / f"step-{steps:09d}" / "model.safetensors") for run in (expected, found)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_four_processes_of_two_micro_batches_give_the_run_of_one(shards: Path, tmp_path: Path) -> None:
    for name, arguments, processes in [("one", (), 1), ("four", (*FSDP, "--run.micro_batch_size", "4"), 4)]:
        (tmp_path / name).mkdir()
        done = run(shards, tmp_path / name, *arguments, "--run.steps", "4", processes=processes)
        assert done.returncode == 0, done.stderr
    close(tmp_path / "one" / "run", tmp_path / "four" / "run", 4)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("order", [("fsdp", "zero"), ("zero", "fsdp")])
def test_a_checkpoint_goes_to_zero_and_back(shards: Path, tmp_path: Path, order: tuple[str, str]) -> None:
    common = ("--optim.name", "adamw", "--optim.lr", "1e-4")
    for step, name in enumerate(order, start=1):
        config, more = (None, FSDP) if name == "fsdp" else ("deepspeed_zero2", ())
        (tmp_path / "parts").mkdir(exist_ok=True)
        done = run(
            shards, tmp_path / "parts", *common, *more, "--run.steps", str(step), processes=2, config=config
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (tmp_path / "whole").mkdir()
    done = run(shards, tmp_path / "whole", *common, "--run.steps", "2", processes=2)
    assert done.returncode == 0, done.stderr
    close(tmp_path / "whole" / "run", tmp_path / "parts" / "run", 2)


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_to_the_same_weights(shards: Path, tmp_path: Path) -> None:
    """SIGTERM to one process: all leave with 85 after a checkpoint, and the same command ends bit for bit the same."""
    arguments = (*JOB, *FSDP, "--data.shards", str(shards), "--run.steps", "12", "--run.output_dir")
    whole = Ranks(tmp_path, *arguments, "whole", processes=2)
    assert [code for code, _ in whole.wait()] == [0, 0]
    stopped = Ranks(tmp_path, *arguments, "stopped", processes=2)
    journal = tmp_path / "stopped" / "journal.jsonl"
    deadline = time.monotonic() + 200
    while not (journal.exists() and training_lines(tmp_path / "stopped")):
        assert time.monotonic() < deadline, stopped.wait(1)
        time.sleep(0.02)
    stopped.started[1].send_signal(signal.SIGTERM)
    assert [code for code, _ in stopped.wait()] == [85, 85]
    assert 0 < len(training_lines(tmp_path / "stopped")) < 12
    again = Ranks(tmp_path, *arguments, "stopped", processes=2)
    assert [code for code, _ in again.wait()] == [0, 0]
    for file in ("model.safetensors", "optimizer.safetensors"):
        paths = [tmp_path / name / "checkpoints" / "step-000000012" / file for name in ("whole", "stopped")]
        assert paths[0].read_bytes() == paths[1].read_bytes(), file


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        ({"accumulation": "bitwise"}, 2, "run.accumulation bitwise reads whole weights"),
        ({"accumulation": "plain", "micro_batch_size": 4}, 2, "needs two graphs at a time"),
        ({}, 1, "there is one process"),
        ({"name": "lars"}, 2, "LARS needs the norm of whole layers"),
        ({"deepspeed": True}, 2, "DeepSpeed's launcher shards by itself"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    arguments: dict[str, Any], world: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments.pop("deepspeed", False):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    optim = OptimConfig(name=arguments.pop("name", "adam"))
    settings = RunConfig(fsdp=True, batch_size=64, **arguments)
    with pytest.raises(InputError, match=rf"^run.fsdp is true: [^\n]*{message}[^\n]*$"):
        check_fsdp(PretrainConfig(run=settings, optim=optim), world, settings.micro_batch_size or 64 // world)


def test_such_a_job_ends_before_it_begins(shards: Path, tmp_path: Path) -> None:
    done = run(shards, tmp_path, *FSDP, processes=1)
    told = [line for line in done.stderr.splitlines() if line.startswith("ca2cl: error")]
    assert done.returncode == 2 and len(told) == 1 and "there is one process" in told[0], done.stderr
    assert not (tmp_path / "run").exists()
