"""Networks of an encoder and heads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ca2cl.models.backbone import build_encoder
from ca2cl.models.heads import Network


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_a_pass_is_autocast_and_keeps_no_copies_of_weights_beside_the_graph(half: torch.dtype | None) -> None:
    network, seen = Network(build_encoder("timm/test_vit", image_size=32)), []
    network.autocast_dtype = half

    def look(module: nn.Module, args: object, output: torch.Tensor) -> None:
        seen.append((output.dtype, torch.is_autocast_cache_enabled()))

    network.projector.hidden.register_forward_hook(look)
    found = network(torch.randn(2, 3, 32, 32))
    assert seen == [(half or torch.float32, False)]
    assert found.z.dtype == found.g.dtype == torch.float32
