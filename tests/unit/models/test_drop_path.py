"""Drop path against its definition: integers of any size, one row and layer at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.models.backbone import build_encoder
from ca2cl.models.blocks.drop_path import DropPath, RowDraws, dropping, uniform
from ca2cl.models.heads import Network
from ca2cl.views.draw.random import row_words

VIT, RESNET = "timm:test_vit", "timm:test_resnet"
MASK = (1 << 64) - 1


def words(count: int, seed: int = 0) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=torch.Generator().manual_seed(seed))


def split_mix(word: int, number: int) -> float:
    """The ``number``-th output, from 1, of SplitMix64 started at ``word``: its first 24 bits as a fraction."""
    x = (word + number * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return ((x ^ (x >> 31)) >> 40) / 2**24


def test_numbers_are_those_of_split_mix() -> None:
    starts = torch.cat([words(20), torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    found = uniform(starts, 3)
    for row, word in enumerate(starts.tolist()):
        assert [split_mix(word & MASK, number) for number in (1, 2, 3)] == found[:, row].tolist()


def test_a_rows_branch_is_left_out_or_scaled() -> None:
    draws, starts = RowDraws(), words(64)
    layers = [draws.layer(0.25).train(), draws.layer(0.5).train()]
    x = torch.randn(64, 3, 2)
    with draws.of(starts):
        found = [layer(x) for layer in layers]
    for number, rate in enumerate((0.25, 0.5)):
        for row, word in enumerate(starts.tolist()):
            kept = split_mix(word & MASK, number + 1) >= rate
            expected = x[row] * torch.tensor(1 / (1 - rate)) if kept else torch.zeros(3, 2)
            assert torch.equal(found[number][row], expected)
    assert torch.equal(layers[0].eval()(x), x)


def test_rates_rise_with_depth_and_are_met() -> None:
    network = Network(build_encoder(VIT, image_size=32, drop_path=0.5)).train()
    layers = [layer for layer in network.modules() if isinstance(layer, DropPath)]
    assert [layer.rate for layer in layers] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5])
    tiles = torch.arange(20_000).numpy() << 40  # related keys
    for view in torch.from_numpy(row_words(tiles, seed=3, epoch=1, views=("strong", "weak"))):
        with dropping(network, view):
            left_out = layers[0].draws.table_LB == 0
        assert left_out.float().mean(1).tolist() == pytest.approx([layer.rate for layer in layers], abs=0.015)
        together = torch.corrcoef(left_out.float())
        assert float((together - torch.eye(10)).abs().max()) < 0.04


def test_epochs_seeds_and_views_draw_anew_and_a_tile_always_alike() -> None:
    keys = words(8).numpy()
    first = row_words(keys, seed=0, epoch=0, views=("strong", "weak"))
    assert (row_words(keys[3:5], seed=0, epoch=0, views=("strong", "weak")) == first[:, 3:5]).all()
    others = [row_words(keys, seed=seed, epoch=epoch, views=("strong", "weak")) for seed, epoch in ((1, 0), (0, 1))]
    assert len({int(word) for drawn in (first, *others) for word in drawn.ravel()}) == 3 * 2 * 8


@pytest.mark.parametrize("arch", [VIT, RESNET, "timm:convnext_atto"])
def test_a_row_meets_one_network_whoever_its_neighbours_are(arch: str) -> None:
    torch.manual_seed(0)
    network = Network(build_encoder(arch, "frozen", image_size=32, drop_path=0.5)).train()
    for parameter in network.parameters():
        if parameter.ndim == 1:  # branches begin with a scale of nearly 0
            torch.nn.init.normal_(parameter, 1.0, 0.1)
    x, starts = torch.randn(6, 3, 32, 32), words(6)
    whole = network(x, None, None, starts).z
    order = torch.tensor([4, 0, 5])
    torch.testing.assert_close(network(x[order], None, None, starts[order]).z, whole[order], rtol=1e-4, atol=1e-5)
    other = network(x, None, None, words(6, seed=1)).z
    assert float((other - whole).detach().norm(dim=1).max()) > 1e-3  # another network
    still = copy.deepcopy(network).eval()
    assert torch.equal(still(x).z, still(x, None, None, starts).z)


def test_a_method_without_words_is_refused() -> None:
    network = Network(build_encoder(VIT, image_size=32, drop_path=0.5)).train()
    with pytest.raises(InputError, match=r"gives its network no words.*--model.drop_path 0"):
        network(torch.randn(2, 3, 32, 32))


@pytest.mark.parametrize("arch", ["resnet18", "timm:vgg11_bn"])
def test_a_body_without_drop_path_is_refused(arch: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=rf"model.drop_path is 0.1: {arch} has no drop path"):
        build_encoder(arch, image_size=64, drop_path=0.1)
