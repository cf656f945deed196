"""Drop path and recomputed activations on real gloo processes: one step is that of one process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ca2cl.methods.base import ViewBatch
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.blocks.drop_path import DropPath
from ca2cl.models.heads import Network
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
    ("arch", "kind"), [("timm:test_vit", "exact"), ("timm:test_vit", "bitwise"), ("timm:test_resnet", "exact")]
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


@pytest.mark.parametrize(
    ("arch", "norm", "count", "kind"),
    [
        ("timm:test_vit", "sync", 2, "exact"),
        ("timm:test_resnet", "sync", 1, "exact"),  # collectives in forward passes, those of backward passes included
        ("timm:test_resnet", "lane_group", 2, "exact"),
        ("timm:test_vit", "sync", 2, "bitwise"),
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


@pytest.mark.parametrize(("count", "clean"), [(1, False), (2, False), (2, True)])
def test_bitwise_and_recomputed_blocks_with_parameters_of_their_own(count: int, clean: bool) -> None:
    """ConvNeXt's blocks have a layer scale: ``bitwise`` takes such a block some rows at a time."""
    torch.manual_seed(0)
    network = awake(Network(build_encoder("timm:convnext_atto", image_size=32, drop_path=0.4))).train()
    expected = step(copy.deepcopy(network), 0, 1, 1, "bitwise", clean=clean)
    network.encoder.set_grad_checkpointing()  # type: ignore[union-attr, operator]
    found = step(network, 0, 1, count, "bitwise", clean=clean)
    for name in (name for name in expected if not name.startswith("term")):
        assert torch.equal(found[name], expected[name]), name
