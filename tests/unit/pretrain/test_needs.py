"""What a step needs is said before the first one, and refused in one line where a machine does not have it."""

from __future__ import annotations

import gc
import resource
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2cl.cli import main
from ca2cl.common.tables import duration
from ca2cl.config import ObjectiveConfig, OptimConfig
from ca2cl.errors import InputError
from ca2cl.methods.base import Method, MethodSettings
from ca2cl.methods.registry import build_method
from ca2cl.models.backbone import Backbone, build_encoder, outline
from ca2cl.models.heads import Network
from ca2cl.pretrain.memory.activations import StepMemory, bytes_a_tile, quick_step
from ca2cl.pretrain.memory.check import LIKELY, SURE, check_memory, check_teacher
from ca2cl.pretrain.memory.dry_step import LiveBytes, step_memory
from ca2cl.pretrain.memory.held import held_bytes, weights_bytes
from ca2cl.pretrain.memory.machine import _left_in_cgroups, free_bytes, limit_left
from ca2cl.pretrain.teacher import FoundTeacher, LiveTeacher
from ca2cl.runtime.precision import _has
from tests.support.jobs import make_shards

CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_the_estimate_is_what_autograd_keeps(arch: str) -> None:
    network, kept = Network(build_encoder(arch)).train(), {}
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(torch.randn(4, 3, 96, 96))
    found = sum(size for place, size in kept.items() if place not in own) / 4
    assert bytes_a_tile(Network, arch, 96, "no") == pytest.approx(found, rel=0.1)
    assert bytes_a_tile(Network, arch, 96, "bf16") < 0.7 * found


def test_the_estimate_draws_nothing_from_the_jobs_generator() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    bytes_a_tile(Network, "resnet18", 96, "no")
    assert torch.equal(torch.rand(3), expected)


def test_what_fits_is_said_and_what_cannot_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    free = free_bytes(CPU)
    check_memory(lambda rows: rows * free / 5e3, 8, 64, CPU)
    assert "a step holds about" in caplog.text and "free" in caplog.text
    assert max(map(len, caplog.messages[0].splitlines())) < 80
    check_memory(lambda rows: rows * free / 64, 54, 54, CPU)
    assert caplog.records[-1].levelname == "WARNING" and "may not be enough" in caplog.text
    with pytest.raises(
        InputError,
        match=r"micro_batch_size is 512, a process's whole share.*use --run.micro_batch_size (32|16) or less",
    ):
        check_memory(lambda rows: rows * free / 64, 512, 512, CPU)


@pytest.mark.parametrize("version", [1, 2])
def test_a_cgroups_limit_counts_less_what_files_hold(tmp_path: Path, version: int) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    base, line = tmp_path / "memory", "4:cpu,memory:/job/step\n"
    if version == 2:
        names, base, line = ("memory.max", "memory.current", "inactive_file"), tmp_path, "0::/job/step\n"
    for folder, limit in ((base / "job" / "step", "9000"), (base / "job", "5000"), (base, "max")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text("3000\n")
        (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 700\n")
    (tmp_path / "own").write_text(line)
    assert sorted(_left_in_cgroups(tmp_path, tmp_path / "own")) == [2700, 6700]


def test_durations_are_in_the_two_largest_units() -> None:
    told = {2.44: "2.4 s", 99: "99 s", 200: "3 min 20 s", 5 * 3600 + 720: "5 h 12 min", 76 * 3600 * 2: "6 d 8 h"}
    assert {seconds: duration(seconds) for seconds in told} == told


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("needs"), 10)


def test_a_job_that_cannot_fit_is_one_line_and_leaves_nothing(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    arguments = ["--recipe", "smoke", "--data.shards", str(shards), "--run.output_dir", str(run)]
    assert main(["pretrain", *arguments, "--data.image_size", "16384"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("ca2cl: error: run.micro_batch_size is 32") and "a step holds about" in line
    assert not run.exists()


@pytest.mark.skipif(_has("fp16"), reason="this CPU has fp16")
def test_fp16_is_refused_where_it_is_emulated(shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    arguments = ["--recipe", "smoke", "--data.shards", str(shards), "--run.output_dir", str(run)]
    assert main(["pretrain", *arguments, "--run.precision", "fp16"]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "run.precision is fp16, which this CPU emulates" in line and line.endswith("use --run.precision no")
    assert not run.exists()


def test_memory_is_linear_between_and_beyond_its_points() -> None:
    memory = StepMemory(((16, 100.0), (64, 148.0), (256, 532.0)))
    assert [memory.of(rows) for rows in (2, 16, 40, 64, 160, 256, 512)] == [86, 100, 124, 148, 340, 532, 1044]
    assert memory.a_tile == 2 and StepMemory(((0, 5.0), (1, 7.0))).of(10) == 25


def exact_step(
    method: Method, arch: str, size: int, precision: str, micro_batches: int, recomputed: bool, sharded: bool
) -> StepMemory:
    def build() -> torch.nn.Module:
        encoder = outline(arch, "frozen", image_size=size)
        if recomputed:
            encoder.set_grad_checkpointing()
        with torch.device("meta"):
            network = method.build(encoder)
        network.autocast_dtype = torch.bfloat16 if precision != "no" else None  # type: ignore[assignment]
        return network

    return step_memory(
        method, build, size, torch.float32, CPU, micro_batches=micro_batches, recomputed=recomputed, sharded=sharded
    )


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("arch", "size", "name", "micro_batches", "recomputed", "precision", "sharded"),
    [
        ("timm:test_vit", 96, "ca2cl", 1, False, "no", False),
        ("resnet18", 64, "distill", 1, False, "no", False),
        pytest.param("resnet18", 96, "ca2cl", 1, False, "no", False, marks=slow),
        pytest.param("resnet18", 96, "ca2cl", 2, False, "no", False, marks=slow),
        pytest.param("resnet18", 96, "ca2cl", 1, True, "no", False, marks=slow),
        pytest.param("resnet18", 96, "ca2cl", 2, True, "no", False, marks=slow),
        pytest.param("resnet18", 96, "ca2cl", 1, False, "bf16", False, marks=slow),
        pytest.param("resnet18", 96, "ca2cl", 1, False, "no", True, marks=slow),
        pytest.param("resnet18", 96, "simclr", 2, False, "no", False, marks=slow),
        pytest.param("timm:convnext_atto", 96, "ca2cl", 1, False, "no", False, marks=slow),
        pytest.param("timm:vit_small_patch16_224", 224, "ca2cl", 1, False, "no", False, marks=slow),
        pytest.param("timm:vit_small_patch16_224", 224, "ca2cl", 2, True, "no", False, marks=slow),
        pytest.param("timm:vit_small_patch16_224", 224, "simclr", 1, False, "bf16", False, marks=slow),
        pytest.param("timm:vit_small_patch16_224", 224, "ca2cl", 1, True, "no", True, marks=slow),
    ],
)
def test_the_quick_estimate_is_near_the_exact_one(
    arch: str, size: int, name: str, micro_batches: int, recomputed: bool, precision: str, sharded: bool
) -> None:
    """Within the factors by which a job is refused or warned of; with the copies of weights that autocast keeps."""
    method = build_method(name, MethodSettings(ObjectiveConfig()))
    if name == "distill":
        method.take_teacher(Known())
    quick = quick_step(method, arch, size, precision, recomputed=recomputed, sharded=sharded)
    exact = exact_step(method, arch, size, precision, micro_batches, recomputed, sharded)
    numbers = sum(p.numel() for p in method.build(build_encoder(arch, image_size=size)).parameters())
    copies = 0 if precision == "no" or recomputed else 2 * numbers * (1 if sharded else method.graphs)
    for rows in (16, 32, 64, 128):
        assert SURE < exact.of(rows) / (quick.of(rows) + copies) < LIKELY, rows


class Known:
    """A teacher whose features are cached."""

    feature_dim = 8

    def known(self, tiles: Any) -> torch.Tensor:
        return torch.empty(len(tiles.keys), 8)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise AssertionError


def test_a_teachers_pass_is_counted_and_its_weights_must_fit() -> None:
    encoder = build_encoder("resnet18").eval()
    mean, std = (0.5,) * 3, (0.2,) * 3
    teacher = LiveTeacher(encoder.requires_grad_(False), 512, 64, (mean, std), (mean, std))
    peaks = []
    for rows in (4, 8):
        x = torch.randn(rows, 3, 96, 96)
        with LiveBytes() as live:
            teacher(x)
        peaks.append(live.peak)
    found = FoundTeacher(teacher, "here", "digest", ()).pass_bytes(96, torch.float32)
    assert found == pytest.approx((peaks[1] - peaks[0]) / 4, rel=0.01) and found > 2 * 64 * 32 * 32 * 4
    assert FoundTeacher(Known(), "here", "digest", ()).pass_bytes(96, torch.float32) == 0
    assert weights_bytes(encoder) == pytest.approx(4 * sum(p.numel() for p in encoder.parameters()), rel=0.01)
    check_teacher(1e6, CPU)
    with pytest.raises(InputError, match=r"has a teacher of 1000000.0 GB; .* or --method.options cache=FOLDER"):
        check_teacher(1e15, CPU)


def test_the_estimates_network_is_freed() -> None:
    """Autograd's hooks once kept it for the rest of the job: as much memory as the weights."""
    made: list[weakref.ref[torch.Tensor]] = []

    def build(encoder: Backbone) -> Network:
        network = Network(encoder)
        to_empty = network.to_empty

        def watched(**where: Any) -> Network:
            moved = to_empty(**where)
            made.extend(weakref.ref(parameter) for parameter in moved.parameters())
            return moved

        network.to_empty = watched  # type: ignore[method-assign, assignment]
        return network

    bytes_a_tile(build, "timm/test_vit", 32, "no")
    gc.collect()
    assert made and not any(ref() is not None for ref in made)


def held_by(sharing: Any, arch: str = "resnet18", copies: int = 0, **optim: Any) -> float:
    """Bytes of each of four CPU processes."""
    return held_bytes(lambda: Network(build_encoder(arch)), OptimConfig(**optim), sharing, 4, CPU, copies=copies)


@pytest.mark.parametrize(
    ("optimizer", "sharing", "expected"),
    [
        ("adamw", "ddp", 16), ("sgd", "ddp", 12), ("adam", "zero1", 4 + 12 / 4), ("adam", "zero2", 4 + 12 / 4),
        ("sgd", "zero2", 4 + 8 / 4),
    ],
)  # fmt: skip
def test_bytes_of_a_parameter(optimizer: Any, sharing: Any, expected: float) -> None:
    network = Network(build_encoder("resnet18"))
    numbers, buffers = sum(p.numel() for p in network.parameters()), sum(b.numel() for b in network.buffers())
    assert held_by(sharing, name=optimizer) == pytest.approx(expected * numbers + 2 * 4 * buffers)


@pytest.mark.parametrize(("sharing", "more"), [("ddp", 4), ("zero1", 4), ("zero2", 4), ("fsdp", 1)])
def test_an_average_is_whole_but_in_shards(sharing: Any, more: float) -> None:
    numbers = sum(p.numel() for p in Network(build_encoder("resnet18")).parameters())
    assert (held_by(sharing, ema=0.9) - held_by(sharing)) / numbers == pytest.approx(more)


def test_graphs_in_half_precision_keep_copies_of_the_weights() -> None:
    numbers = sum(p.numel() for p in Network(build_encoder("resnet18")).parameters())
    assert (held_by("ddp", copies=2) - held_by("ddp")) / numbers == pytest.approx(2 * 2)


def test_shards_and_two_blocks_are_held_by_each_process() -> None:
    network = Network(build_encoder("timm:test_vit"))
    numbers, block = (
        sum(p.numel() for p in module.parameters()) for module in (network, network.encoder.body.blocks[0])
    )
    assert held_by("fsdp", "timm:test_vit") == pytest.approx(16 * numbers / 4 + 2 * 8 * block)


def test_an_optimizer_that_does_not_fit_is_refused_with_the_way_out() -> None:
    with pytest.raises(InputError, match=r"weights, gradients and optimizer state; 1\.0 GB are free.*--run.fsdp true"):
        check_memory(lambda rows: 2e6 * rows, 8, 64, CPU, held=2e9, limit=1e9)
    with pytest.raises(InputError, match="or more processes"):
        check_memory(lambda rows: 2e6 * rows, 8, 64, CPU, held=2e9, limit=1e9, sharded=True)
    check_memory(lambda rows: 2e6 * rows, 8, 64, CPU, held=0.5e9, limit=1e9)
    with pytest.raises(InputError, match="run.micro_batch_size is 64.*beside 0.5 GB of weights"):
        check_memory(lambda rows: 2e7 * rows, 64, 64, CPU, held=0.5e9, limit=1e9)


def test_a_limit_of_the_shell_counts() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    assert limit_left() == float("inf") or soft != resource.RLIM_INFINITY
    try:
        resource.setrlimit(resource.RLIMIT_DATA, (16 << 30, hard))
        left = limit_left()
        taken = bytearray(1 << 28)
        assert 1 << 30 < left < 16 << 30 and left - limit_left() == pytest.approx(len(taken), rel=0.1)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
