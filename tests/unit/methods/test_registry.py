"""Methods by name, and SimCLR against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.methods.base import LocalEngine, Method, MethodSettings, ViewBatch
from ca2cl.methods.registry import METHODS, build_method, find_method, known_method
from ca2cl.methods.simclr import SimCLR, SimCLRNetwork
from ca2cl.models.backbone import build_encoder


def slow_simclr(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 1 of arXiv 2002.05709, row by row."""
    rows = [*first, *second]
    loss, pairs = first.new_zeros(()), len(first)
    for i in range(2 * pairs):
        others = [torch.dot(rows[i], rows[k]) / temperature for k in range(2 * pairs) if k != i]
        positive = torch.dot(rows[i], rows[(i + pairs) % (2 * pairs)]) / temperature
        loss = loss + torch.stack(others).exp().sum().log() - positive
    return loss / (2 * pairs)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_simclr_is_a_slow_loop_over_all_pairs(micro_batches: int) -> None:
    """The loss and every parameter's gradient; in fp32, for the projector ends in it."""
    torch.manual_seed(0)
    network = SimCLRNetwork(build_encoder("resnet18", "frozen"), 16).train()
    x1, x2 = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32)
    raw = [network.projector.out(network.projector.hidden(network.encoder(x)).relu()) for x in (x1, x2)]
    expected = slow_simclr(unit(raw[0]), unit(raw[1]), 0.5)
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    rows = torch.arange(6).split(6 // micro_batches)
    found = SimCLR(0.5).step(LocalEngine(network), [ViewBatch(x1[r], x2[r], r) for r in rows])
    assert float(found["loss"]) == pytest.approx(expected.item(), rel=1e-5)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm() / gradient.norm()) < 1e-3, name


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("simcrl", "did you mean simclr?"),
        ("nowhere:Method", "no module 'nowhere'"),
        ("json:Method", "json has no 'Method'"),
        ("json:loads", "not a subclass"),
    ],
)
def test_what_is_no_method_is_one_line(name: str, line: str) -> None:
    with pytest.raises(InputError, match=line):
        find_method(name)


def test_a_name_from_a_files_side_imports_nothing() -> None:
    assert known_method("simclr") is SimCLR and known_method("toy_method:Toy") is Method


def test_every_method_is_made_from_its_name_alone() -> None:
    for name in METHODS:
        method = build_method(name, MethodSettings())
        assert {"loss"} <= {term for _, _, terms in method.curves for term, _ in terms}
        assert all(len(terms) == 1 for _, _, terms in method.curves), "each loss has an axis of its own"
        with pytest.raises(InputError, match="method.options has .momentum.: there are"):
            build_method(name, MethodSettings(), ["momentum=1"])
