"""Drop path and recomputed activations on real gloo processes: one step is that of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.methods.base import LocalEngine, ViewBatch
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.blocks.drop_path import DropPath
from ca2cl.models.heads import Network
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.fsdp import FsdpEngine, shard
from ca2cl.training.optim import build_optimizer
from tests.jobs.pretrain.test_distributed_step import (
    BATCH,
    CLEAN,
    GROUP,
    GROUPS,
    WHOLE,
    AveragingEngine,
    DoubleNetwork,
    compare,
    micro_batches,
)
from tests.support.forked import on_ranks

OPTIM = OptimConfig(
    name="adamw", weight_decay=0.05, layer_decay=0.7, decay_all=False, freeze_layers=1, freeze_steps=1, ema=0.9
)
WORDS = torch.randint(-(2**63), 2**63 - 1, (2, BATCH), generator=torch.Generator().manual_seed(7))


def step(network: Any, rank: int, world: int, count: int, kind: str, *, clean: bool = False) -> dict[str, Tensor]:
    """Terms, gradients and statistics of one step on a rank's share."""
    dtype = next(network.parameters()).dtype
    views = [_typed(one, dtype) for one in micro_batches(rank, world, count)]
    method: Any = CA2CL(CLEAN if clean else WHOLE)
    terms = (Bitwise(method, GROUPS.block) if kind == "bitwise" else method).step(AveragingEngine(network), views)
    grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    buffers = {name: b for name, b in network.named_buffers() if "running" in name}
    return {**{f"term {k}": v for k, v in terms.items()}, **grads, **buffers}


def _typed(one: ViewBatch, dtype: torch.dtype) -> ViewBatch:
    return one._replace(x1=one.x1.to(dtype), x2=one.x2.to(dtype), words=WORDS[:, one.positions])


def work(rank: int, world: int, network: Any, count: int, kind: str, recomputed: bool, out: str) -> None:
    dist.init_process_group("gloo")
    network = copy.deepcopy(network)  # spawned processes share the tensors that they are given
    if recomputed:
        network.encoder.set_grad_checkpointing()
    result = step(network, rank, world, count, kind)
    if rank == 0:
        torch.save(result, out)
    dist.destroy_process_group()


def on_processes(network: Any, count: int, kind: str, folder: Path, *, recomputed: bool = False) -> dict[str, Tensor]:
    """Of two processes, rank 0's."""
    out = folder / f"{recomputed}.pt"
    on_ranks(work, 2, 2, network, count, kind, recomputed, str(out))
    found: dict[str, Tensor] = torch.load(out, weights_only=True)
    return found


def awake(network: nn.Module) -> nn.Module:
    """Branches begin with a scale of nearly 0, or their last norm with 0: drop path would drop nothing."""
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.1)
    return network


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("timm:test_vit", "exact"),
        pytest.param("timm:test_vit", "bitwise", marks=pytest.mark.slow),  # test_tuned_runs has it
        pytest.param("timm:test_resnet", "exact", marks=pytest.mark.slow),
    ],
)
def test_rows_leave_out_the_same_branches_on_any_hardware(arch: str, kind: str, tmp_path: Path) -> None:
    """In double precision 1e-9, in ``bitwise`` and single precision every bit."""
    torch.manual_seed(0)
    encoder = build_encoder(arch, "lane_group", group=GROUP, image_size=32, drop_path=0.4)
    network = awake(DoubleNetwork(encoder).double() if kind == "exact" else Network(encoder)).train()
    assert any(isinstance(layer, DropPath) for layer in network.modules())
    expected = step(copy.deepcopy(network), 0, 1, 1, kind)
    halves = step(copy.deepcopy(network), 0, 1, 2, kind)
    found = on_processes(network, 2, kind, tmp_path)
    assert expected["term skipped_adversaries"] == 0 and expected.keys() == found.keys() == halves.keys()
    if kind == "exact":
        compare(expected, found)
        compare(expected, halves)
    else:
        for name in (name for name in expected if not name.startswith("term")):
            assert torch.equal(found[name], expected[name]) and torch.equal(halves[name], expected[name]), name
    for layer in network.modules():
        if isinstance(layer, DropPath):
            layer.rate = 0.0
            layer.draws._rates = [0.0 for _ in layer.draws._rates]
    others = step(network, 0, 1, 1, kind)
    assert abs(float(others["term nt_xent"] - expected["term nt_xent"])) > 1e-4  # something was left out


def test_the_order_of_rows_does_not_show() -> None:
    """The weak view has groups of its own; without BatchNorm these change nothing, and a row keeps its draws."""
    torch.manual_seed(0)
    network = awake(DoubleNetwork(build_encoder("timm:test_vit", image_size=32, drop_path=0.4)).double()).train()
    (views,) = (_typed(one, torch.float64) for one in micro_batches(0, 1, 1))
    assert views.second_order is not None and not torch.equal(views.second_order, torch.arange(BATCH))
    found = []
    for one in (views, views._replace(second_order=None)):
        twin = copy.deepcopy(network)
        CA2CL(WHOLE).step(LocalEngine(twin), [one])
        found.append({name: p.grad for name, p in twin.named_parameters() if p.grad is not None})
    compare(*found)


@pytest.mark.parametrize(
    ("arch", "norm", "count", "kind"),
    [
        pytest.param("timm:test_vit", "sync", 2, "exact", marks=pytest.mark.slow),
        ("timm:test_resnet", "sync", 1, "exact"),  # collectives in forward passes, those of backward passes included
        pytest.param("timm:test_resnet", "lane_group", 2, "exact", marks=pytest.mark.slow),
        pytest.param("timm:test_vit", "sync", 2, "bitwise", marks=pytest.mark.slow),
    ],
)
def test_recomputed_activations_change_no_bit_of_a_step(
    arch: str, norm: Any, count: int, kind: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(arch, norm, group=GROUP, image_size=32, drop_path=0.4)
    network = awake(Network(encoder)).train()
    kept = on_processes(network, count, kind, tmp_path)
    found = on_processes(network, count, kind, tmp_path, recomputed=True)
    assert kept.keys() == found.keys() and len(kept) > 50
    assert all(torch.equal(found[name], value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("count", "clean"),
    [(2, False), pytest.param(1, False, marks=pytest.mark.slow), pytest.param(2, True, marks=pytest.mark.slow)],
)
def test_bitwise_and_recomputed_blocks_with_parameters_of_their_own(count: int, clean: bool) -> None:
    """ConvNeXt's blocks have a layer scale: ``bitwise`` takes such a block some rows at a time."""
    torch.manual_seed(0)
    network = awake(Network(build_encoder("timm:convnext_atto", image_size=32, drop_path=0.4))).train()
    expected = step(copy.deepcopy(network), 0, 1, 1, "bitwise", clean=clean)
    network.encoder.set_grad_checkpointing()  # type: ignore[union-attr, operator]
    found = step(network, 0, 1, count, "bitwise", clean=clean)
    for name in (name for name in expected if not name.startswith("term")):
        assert torch.equal(found[name], expected[name]), name


def tuned(rank: int, world: int, given: nn.Module, sharded: bool, folder: str) -> None:
    """Two steps with groups, drop path, recomputed blocks and an average, a checkpoint after each."""
    accelerator = build_accelerator()
    network: Any = copy.deepcopy(given)
    network.encoder.set_grad_checkpointing()
    if sharded:
        network = shard(network, accelerator.device)
    optimizer = build_optimizer(OPTIM, network, network.encoder)
    engine = (FsdpEngine if sharded else AccelerateEngine)(accelerator, network, optimizer)
    engine.keep_average(OPTIM.ema)
    keeper = Checkpointer(Path(folder), 9)
    for number in range(2):
        views = [_typed(one, torch.float64) for one in micro_batches(rank, world, 1)]
        terms = CA2CL(WHOLE).step(engine, views)
        engine.average(engine.optimizer_step(1e-3, None, terms["loss"], number))
        keeper.save(number + 1, engine, {})
    before = {name: whole.gather().clone() for name, whole in engine.average_state().items()}
    restore(Path(folder) / "step-000000001", engine)
    restored = {name: whole.gather().clone() for name, whole in engine.average_state().items()}
    assert any(not torch.equal(restored[name], value) for name, value in before.items())
    restore(Path(folder) / "step-000000002", engine)
    found = {name: whole.gather() for name, whole in engine.average_state().items()}
    assert all(torch.equal(found[name], value) for name, value in before.items())
    accelerator.end_training()


@pytest.mark.slow
def test_groups_and_average_are_the_same_in_shards(tmp_path: Path) -> None:
    """FSDP2 on two processes, whose optimizer and average know their own rows alone, beside one process."""
    torch.manual_seed(0)
    encoder = build_encoder("timm:test_vit", image_size=32, drop_path=0.4)
    network = awake(DoubleNetwork(encoder).double()).train()
    on_ranks(tuned, 1, 1, network, False, str(tmp_path / "one"))
    on_ranks(tuned, 2, 2, network, True, str(tmp_path / "two"))
    for file in ("model", "ema"):
        ours, theirs = (load_file(tmp_path / run / "step-000000002" / f"{file}.safetensors") for run in ("one", "two"))
        assert ours.keys() == theirs.keys() and len(ours) > 70
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-7, atol=1e-9)
