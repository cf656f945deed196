"""Activation checkpointing: the same numbers to the last bit, from less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import BatchNorm, commit_statistics
from ca2cl.models.heads import Network
from ca2cl.pretrain.memory.activations import _kept_bytes, _Saved, bytes_a_tile
from tests.unit.models.test_drop_path import words

BODIES = [
    ("timm:test_vit", 6),
    ("timm:test_resnet", 4),
    ("timm:convnext_atto", 12),
    ("timm:test_efficientnet", 5),
    ("resnet18", 8),
]


def make(arch: str) -> Network:
    torch.manual_seed(0)
    rate = 0.0 if arch == "resnet18" else 0.3
    return Network(build_encoder(arch, "lane_group", group=2, image_size=32, drop_path=rate)).train()


def twice(network: Network, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Direction and gradients by two backward passes through one graph, as the adversary has them, and buffers."""
    delta = torch.zeros_like(network.encoder.stem.weight, requires_grad=True)
    found = network(x, delta, 0, words(len(x)))
    first = (found.z * torch.arange(128)).sum() + (found.g[:, 5] * found.z[:, 1]).sum()
    (direction,) = torch.autograd.grad(first, delta, retain_graph=True)
    with torch.no_grad():  # a pass between, as of the perturbed stem: the second backward is not through this one
        network(x.flip(0), direction, None, words(len(x), seed=1))
    (found.z[:, 0].sum() + found.g[:, 3].sum()).backward()
    for layer in (layer for layer in network.modules() if isinstance(layer, BatchNorm)):
        assert [sum(map(len, groups)) for groups in layer._recorded.values()] == [len(x) // layer.group], "once each"
    commit_statistics(network)
    grads = [p.grad for p in network.parameters() if p.grad is not None]
    return [direction, *grads], dict(network.named_buffers())


@pytest.mark.parametrize(("arch", "blocks"), BODIES)
def test_gradients_and_statistics_are_the_same_to_the_last_bit(arch: str, blocks: int) -> None:
    network, x = make(arch), torch.randn(4, 3, 32, 32)
    twin = copy.deepcopy(network)
    twin.encoder.set_grad_checkpointing()
    assert len(twin.encoder.blocks()) == blocks
    assert [name for name, _ in twin.named_parameters()] == [name for name, _ in network.named_parameters()]
    (ours, buffers), (theirs, others) = twice(network, x), twice(twin, x)
    assert len(ours) == len(theirs) > 10
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(others[name], value) for name, value in buffers.items())
    if any(isinstance(layer, BatchNorm) for layer in network.modules()):
        assert {int(value) for name, value in buffers.items() if name.endswith("tracked")} == {1}


@pytest.mark.parametrize(("arch", "blocks"), BODIES)
def test_the_estimate_is_what_autograd_keeps(arch: str, blocks: int) -> None:
    """What is outside of the blocks, and their inputs: a checkpointed network really keeps no more."""
    network = make(arch)
    network.encoder.set_grad_checkpointing()
    network.eval()  # saves what training saves, but for drop path's numbers, which are small

    def kept(rows: int) -> int:
        counter = _Saved()
        with counter:
            network(torch.zeros(rows, 3, 32, 32))
        return counter.total()

    found = kept(8) - kept(4)
    network.encoder.set_grad_checkpointing(False)
    four, eight = (_kept_bytes(network, rows, 32, network.encoder.blocks()) for rows in (4, 8))
    assert len(four) == 1 + blocks and min(four[1:]) > 0
    assert eight[0] - four[0] == pytest.approx(found, rel=0.02)
    whole = [_kept_bytes(network, rows, 32)[0] for rows in (4, 8)]
    assert found < 0.8 * (whole[1] - whole[0])


@pytest.mark.parametrize(("arch", "share"), [("timm:test_vit", 0.4), ("resnet18", 0.7)])  # a ResNet's stem is large
def test_a_step_needs_less(arch: str, share: float) -> None:
    less, whole = (bytes_a_tile(Network, arch, 64, "no", recomputed=recomputed) for recomputed in (True, False))
    assert 0.1 * whole < less < share * whole


def test_it_can_be_turned_off_and_nothing_is_recomputed_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    network = make("timm:test_vit")
    kinds = [type(block) for block in network.encoder.blocks()]
    network.encoder.set_grad_checkpointing()
    network.encoder.set_grad_checkpointing()
    assert all(type(block).__mro__[2] is kind for block, kind in zip(network.encoder.blocks(), kinds, strict=True))

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr("ca2cl.models.blocks.recompute.checkpoint", refuse)
    with torch.no_grad():
        network(torch.randn(2, 3, 32, 32), None, None, words(2))
    with pytest.raises(AssertionError, match="checkpointed"):
        network(torch.randn(2, 3, 32, 32), None, None, words(2))
    network.encoder.set_grad_checkpointing(False)
    assert [type(block) for block in network.encoder.blocks()] == kinds


def test_a_body_whose_blocks_are_not_known_is_refused() -> None:
    from tests.unit.training.test_param_groups import Plain

    with pytest.raises(InputError, match=r"its layers have no order \(group_matcher\).*model.checkpoint_activations"):
        Plain().set_grad_checkpointing()
