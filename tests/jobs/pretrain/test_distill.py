"""Distillation jobs: exactness, resumption, the teacher's identity, its cache, and what the student learns."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from ca2cl.cli import main
from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD
from ca2cl.data.fingerprints.seen import read_seen
from ca2cl.methods.base import MethodSettings, Tiles
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.distill.method import DistillBatch
from ca2cl.methods.distill.network import DistillNetwork
from ca2cl.methods.registry import build_method
from ca2cl.models.backbone import build_encoder
from ca2cl.models.encoder_io import EncoderCard, read_card, save_encoder
from tests.jobs.pretrain.test_distributed_step import BATCH, GROUP, GROUPS, AveragingEngine, Double
from tests.jobs.pretrain.test_engines import needs_deepspeed
from tests.support.forked import on_ranks
from tests.support.jobs import make_shards, training_lines
from tests.support.jobs import pretrain as pretrain_on

SIZE = 32
MANIFEST = "ab" * 32


class DoubleDistill(Double, DistillNetwork):
    pass


class Known:
    """A teacher that is a fixed function of a row's pixels."""

    feature_dim = 5

    def known(self, tiles: Tiles) -> None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight = torch.randn(5, x[0].numel(), generator=torch.Generator().manual_seed(7)).to(x.dtype)
        return torch.cat([F.normalize(row.flatten()[None] @ weight.T, dim=1) for row in x])


def one_step(network: Any, rank: int, world: int, count: int, kind: str) -> dict[str, Tensor]:
    """What a rank's share of a batch of 16 leaves, in ``count`` micro-batches."""
    dtype = next(network.parameters()).dtype
    x = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    mine = torch.arange(rank, BATCH, world)
    mine = mine[GROUPS.first_order(mine)]
    method: Any = build_method("distill", MethodSettings())
    method.take_teacher(Known())
    if kind == "bitwise":
        method = Bitwise(method, GROUPS.block)
    batches = [DistillBatch(x[rows], rows, None) for rows in mine.split(len(mine) // count)]
    terms = method.step(AveragingEngine(network), batches)
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in network.named_buffers() if "running" in name}
    return {**{f"term {k}": v for k, v in terms.items()}, **grads, **buffers}


def work(rank: int, world: int, network: Any, count: int, kind: str, out: str) -> None:
    dist.init_process_group("gloo")
    result = one_step(copy.deepcopy(network), rank, world, count, kind)
    if rank == 0:
        torch.save(result, out)
    dist.destroy_process_group()


def on_processes(world: int, network: Any, count: int, kind: str, folder: Path) -> dict[str, Tensor]:
    if world == 1:
        return one_step(network, 0, 1, count, kind)
    on_ranks(work, world, world, network, count, kind, str(folder / "result.pt"))
    found: dict[str, Tensor] = torch.load(folder / "result.pt", weights_only=True)
    return found


@pytest.mark.parametrize(("world", "count"), [(1, 2), (2, 1), (2, 2)])
def test_the_gradient_is_one_processs_to_rounding(world: int, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DoubleDistill(build_encoder("resnet18", "lane_group", group=GROUP), 5).double().train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, "exact")
    found = on_processes(world, network, count, "exact", tmp_path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm().clamp(min=1e-12))
        assert error < 1e-9, (name, error)


@pytest.mark.parametrize(("world", "count"), [(1, 4), (2, 2)])
def test_bitwise_is_the_same_to_the_last_bit(world: int, count: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = DistillNetwork(build_encoder("resnet18", "lane_group", group=GROUP), 5).train()
    expected = one_step(copy.deepcopy(network), 0, 1, 1, "bitwise")
    found = on_processes(world, network, count, "bitwise", tmp_path)
    for name, value in expected.items():
        if name.startswith("term"):
            assert float(found[name]) == pytest.approx(float(value), rel=1e-14)
        else:
            assert torch.equal(found[name], value), name


def write_teacher(folder: Path, seed: int = 0, size: int = SIZE) -> Path:
    torch.manual_seed(seed)
    card = EncoderCard(
        arch="resnet18", feature_dim=512, input_size=size, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        manifest_digest=MANIFEST,
    )  # fmt: skip
    return save_encoder(folder, build_encoder("resnet18").state_dict(), card)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and a teacher."""
    folder = tmp_path_factory.mktemp("distill")
    make_shards(folder, 10)
    write_teacher(folder / "teacher")
    return folder


def job(home: Path, out: Path, *options: str, teacher: Path | None = None) -> list[str]:
    words = [f"teacher={teacher or home / 'teacher'}", *options]
    return [
        "--recipe", "smoke", "--method.name", "distill", "--data.shards", str(home / "shards-0"), "--run.steps", "2",
        "--run.output_dir", str(out), "--tracking.register_as", "none", "--tracking.root", str(out.parent / "store"),
        "--optim.schedule", "constant", "--method.options", *words,
    ]  # fmt: skip


BITWISE = ("--run.accumulation", "bitwise", "--model.norm", "lane_group", "--model.norm_group", "2")


def weights(run: Path, step: int = 2) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:09d}" / "model.safetensors")


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(theirs[name], value) for name, value in ours.items())


def test_a_stopped_job_goes_on_bit_for_bit(home: Path, tmp_path: Path) -> None:
    assert main(["pretrain", *job(home, tmp_path / "one")]) == 0
    parts = job(home, tmp_path / "parts")
    assert main(["pretrain", *parts, "--run.steps", "1"]) == 0
    assert main(["pretrain", *parts]) == 0
    assert same(weights(tmp_path / "one"), weights(tmp_path / "parts"))
    assert not same(weights(tmp_path / "one"), weights(tmp_path / "parts", 1))
    assert all(line["feature"] > 0 and line["relational"] > 0 for line in training_lines(tmp_path / "one"))

    names = {name.partition(".")[0] for name in weights(tmp_path / "one")}
    assert names == {"encoder", "projector"}, "the teacher is in no checkpoint"
    card = read_card(tmp_path / "one" / "encoder" / "card.json")
    assert MANIFEST in card.earlier_manifests, "what the teacher saw had a part in the student"
    seen = read_seen(tmp_path / "one" / "encoder")
    assert seen is not None and seen.manifests == (card.manifest_digest,) and len(seen.fingerprints_ND) > 0


@pytest.mark.slow
@pytest.mark.parametrize("engine", [None, pytest.param("deepspeed_zero2", marks=needs_deepspeed)])
def test_a_bitwise_job_is_the_same_on_two_processes_with_micro_batches(
    home: Path, tmp_path: Path, engine: str | None
) -> None:
    assert main(["pretrain", *job(home, tmp_path / "one"), *BITWISE]) == 0
    two = [*job(home, tmp_path / "two"), *BITWISE, "--run.micro_batch_size", "8"]
    done = pretrain_on(tmp_path, *two, processes=2, config=engine)
    assert done.returncode == 0, done.stderr
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    for a, b in zip(*(training_lines(tmp_path / run) for run in ("one", "two")), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-14)


def test_another_teacher_is_refused_and_the_same_one_elsewhere_is_not(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher, run = write_teacher(tmp_path / "here"), tmp_path / "run"
    assert main(["pretrain", *job(home, run, teacher=teacher), "--run.steps", "1"]) == 0
    write_teacher(tmp_path / "here", seed=1)
    capfd.readouterr()
    assert main(["pretrain", *job(home, run, teacher=teacher)]) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("ca2cl: error: run.output_dir is") and "the teacher, " in error and " at 32 px" in error
    assert main(["pretrain", *job(home, run, "view=strong", teacher=home / "teacher")]) == 2
    assert "method.options" in capfd.readouterr().err
    assert main(["pretrain", *job(home, run, teacher=home / "teacher")]) == 0  # write_teacher's, with the first seed
    assert len(training_lines(run)) == 2


def test_cached_features_are_those_of_the_unaugmented_tiles(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cached = [*job(home, tmp_path / "run", f"cache={tmp_path / 'cache'}")]
    assert main(["pretrain", *cached, "--run.steps", "1"]) == 0
    (file,) = (tmp_path / "cache").glob("*.safetensors")
    before = file.stat().st_mtime_ns
    again = job(home, tmp_path / "again", f"cache={tmp_path / 'cache'}")
    assert main(["pretrain", *again, "--run.steps", "1"]) == 0
    assert file.stat().st_mtime_ns == before
    first, second = (training_lines(tmp_path / run)[0] for run in ("run", "again"))
    assert second["loss"] == first["loss"]
    assert main(["pretrain", *job(home, tmp_path / "live"), "--run.steps", "1"]) == 0
    assert training_lines(tmp_path / "live")[0]["loss"] != pytest.approx(first["loss"], rel=1e-4)

    vectors = load_file(file)["vectors"].numpy()
    out = tmp_path / "embedded.safetensors"
    embed = ["embed", "--encoder", str(home / "teacher"), "--workers", "0"]
    assert main([*embed, str(home / "shards-0"), str(out)]) == 0
    assert np.allclose(vectors, load_file(out)["vectors"].numpy(), atol=1e-5)

    keys = file.with_name(f"{file.stem}.keys.jsonl")
    rows = [json.loads(line) for line in keys.read_text().splitlines()]
    keys.write_text("".join(json.dumps({**row, "key": f"other{number}"}) + "\n" for number, row in enumerate(rows)))
    capfd.readouterr()
    assert main(["pretrain", *job(home, tmp_path / "hole", f"cache={tmp_path / 'cache'}"), "--run.steps", "1"]) == 2
    assert "holds no features of some tile of data.shards" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_share_the_making_of_a_cache(home: Path, tmp_path: Path) -> None:
    for run, processes in (("one", 1), ("two", 2)):
        arguments = job(home, tmp_path / run, f"cache={tmp_path / f'cache-{run}'}")
        done = pretrain_on(tmp_path, *arguments, "--run.steps", "1", processes=processes)
        assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(next((tmp_path / f"cache-{run}").glob("*.safetensors"))) for run in ("one", "two"))
    torch.testing.assert_close(ours["vectors"], theirs["vectors"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "method.options has no teacher: distill needs an encoder"),
        (["teacher=nowhere"], "encoder 'nowhere': not there"),
        (["teacher=random", "teacher_arch=antigravity:fly"], "code outside ca2cl; if you trust it"),
        (["teacher=random", "teacher_arch=timm/test_vit", "teacher_size=100"], "image size 100: "),
    ],
)
def test_a_teacher_that_cannot_be_is_one_line(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], line: str
) -> None:
    """Options may come from a file: a builder that they name is not imported."""
    arguments = job(home, tmp_path / "run")
    (tmp_path / "options.yaml").write_text(json.dumps({"name": "distill", "options": words}))
    arguments = [*arguments[: arguments.index("--method.options")], "--method", str(tmp_path / "options.yaml")]
    assert main(["pretrain", *arguments]) == 2
    error = capfd.readouterr().err.splitlines()
    assert line in error[-1] and not (tmp_path / "run").exists()
