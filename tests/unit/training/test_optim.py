"""Learning rates and optimizers against their definitions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ca2cl.config import OptimConfig
from ca2cl.training.optim import LARS, build_optimizer
from ca2cl.training.schedule import learning_rate


@given(
    total=st.integers(1, 500),
    per_epoch=st.integers(1, 60),
    warmup=st.integers(0, 100),
    schedule=st.sampled_from(["cosine_epoch", "cosine_step"]),
)
def test_the_rate_rises_linearly_and_then_only_falls(total: int, per_epoch: int, warmup: int, schedule: Any) -> None:
    config = OptimConfig(lr=0.5, schedule=schedule, warmup_steps=warmup)
    rates = [learning_rate(config, step, total, per_epoch) for step in range(total)]
    for step in range(min(warmup, total)):
        assert rates[step] == pytest.approx(0.5 * (step + 1) / warmup)
    after = rates[warmup:]
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))


def test_the_papers_cosine_changes_once_an_epoch_and_ends_at_the_last() -> None:
    config = OptimConfig(lr=6e-4, schedule="cosine_epoch")
    for step in range(40):
        expected = 6e-4 * 0.5 * (1 + math.cos(math.pi * (step // 4) / 10))
        assert learning_rate(config, step, 40, 4) == pytest.approx(expected)


def test_lars_matches_its_definition() -> None:
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4))
    optimizer = LARS([weight, bias], lr=0.3, momentum=0.8, weight_decay=0.05, trust=0.02)
    slow = [p.detach().clone() for p in (weight, bias)]
    velocity = [torch.zeros_like(p) for p in slow]
    for _ in range(3):
        for number, parameter in enumerate((weight, bias)):
            parameter.grad = torch.randn_like(parameter)
            update = parameter.grad.clone()
            if parameter.ndim == 2:
                update += 0.05 * slow[number]
                update *= 0.02 * slow[number].norm() / update.norm()
            velocity[number] = 0.8 * velocity[number] + update
            slow[number] = slow[number] - 0.3 * velocity[number]
        optimizer.step()
    torch.testing.assert_close([weight.data, bias.data], slow)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_every_optimizer_takes_the_configured_rate_and_decay(name: Any) -> None:
    optimizer = build_optimizer(OptimConfig(name=name, lr=0.25, weight_decay=0.125), nn.Linear(2, 2))
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25 and group["weight_decay"] == 0.125
