"""``run.compile``: the compiled encoder is one graph, and gives the step of the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import LocalEngine, ViewBatch
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.models.heads import Network


def one_step(norm: Any, *, compiled: bool) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """Terms, the whole gradient in one vector, and the state afterwards."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18", norm, group=4)
    if compiled:
        encoder.compile(dynamic=False)
    network = Network(encoder).train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x1, x2 = (torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last) for _ in range(2))
    method = CA2CL(ObjectiveConfig(clusters=3, lloyd_iterations=2, epsilon=0.1, epsilon_mode="relative"))
    terms = method.step(LocalEngine(network), [ViewBatch(x1, x2, torch.arange(8))])
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return terms, gradient, network.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["sync", "lane_group", "frozen"])
def test_a_compiled_encoder_is_one_graph_and_gives_the_same_step(norm: str) -> None:
    counters.clear()
    terms, gradient, state = one_step(norm, compiled=True)
    assert not counters["graph_break"]
    wanted_terms, wanted_gradient, wanted_state = one_step(norm, compiled=False)
    assert state.keys() == wanted_state.keys()
    for name, value in wanted_terms.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-5, atol=1e-6)
    assert (gradient - wanted_gradient).norm() < 1e-3 * wanted_gradient.norm()
    for name, value in wanted_state.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)
