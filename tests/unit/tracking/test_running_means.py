"""Running means of the losses, and what they are beside: chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.chance import chance_levels
from ca2cl.methods.distill.method import Distill
from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import chance_loss, nt_xent
from ca2cl.methods.simclr import SimCLR
from ca2cl.tracking.running_means import SPAN, LossMeter, RunningMean, smoothed

SETTINGS = {"run.batch_size": 8, "run.accumulation": "exact", "run.micro_batch_size": 4}


def test_a_running_mean_is_unbiased_from_its_first_value_and_forgets() -> None:
    mean = RunningMean()
    assert math.isnan(mean.value)
    for _ in range(3):
        mean.add(5.0)
        assert mean.value == pytest.approx(5)
    mean.add(math.nan)
    mean.add(math.inf)
    assert mean.value == pytest.approx(5), "what is not finite is left out"
    for _ in range(10 * SPAN):
        mean.add(1.0)
    assert mean.value == pytest.approx(1, abs=1e-3)


def test_smoothing_is_as_steady_as_a_mean_of_its_span_and_keeps_gaps() -> None:
    noise = np.random.default_rng(0).normal(size=20_000)
    assert smoothed(noise)[1000:].std() == pytest.approx(1 / SPAN**0.5, rel=0.05)
    gaps = smoothed(np.array([1.0, np.nan, 3.0]))
    assert np.isnan(gaps).tolist() == [False, True, False] and 1 < gaps[2] < 3


@pytest.mark.parametrize("tiles", [2, 16])
def test_chance_is_the_loss_of_embeddings_that_tell_nothing(tiles: int) -> None:
    """All the same, or every one at a right angle to all others."""
    z_GD = torch.eye(1, 2 * tiles).repeat(tiles, 1)
    z1_GD, z2_GD = torch.eye(2 * tiles).split(tiles)
    rows = Rows.at(torch.arange(tiles))
    for first, second in ((z_GD, z_GD), (z1_GD, z2_GD)):
        assert float(nt_xent(first, second, rows, 0.2)) == pytest.approx(chance_loss(tiles), rel=1e-5)


def test_chance_is_named_only_where_it_is_exact() -> None:
    level = math.log(15)
    texts = {name: str(value) for name, value in SETTINGS.items()}
    for settings in (SETTINGS, texts):
        assert chance_levels(CA2CL, settings) == {"nt_xent": level, "nt_xent_adversarial": level}
        assert chance_levels(SimCLR, settings) == {"loss": level}
        assert chance_levels(Distill, settings) == {}
    assert chance_levels(CA2CL, {**SETTINGS, "objective.same_slide_weight": "0.5"}) == {}
    assert chance_levels(CA2CL, {**SETTINGS, "run.accumulation": "plain"}) == {}
    assert chance_levels(CA2CL, {**SETTINGS, "run.accumulation": "plain", "run.micro_batch_size": "None"}) != {}
    assert chance_levels(CA2CL, {}) == chance_levels(CA2CL, {"run.batch_size": "?"}) == {}


def test_the_meter_names_every_term_that_there_is() -> None:
    meter = LossMeter(CA2CL.curves, CA2CL.chance(ObjectiveConfig(), 64))
    assert meter.text() == ""
    for loss in (8.0, 10.0):
        meter.add({"step": 1, "loss": loss, "nt_xent": 4.0, "cluster": None, "same_slide_negatives": 0.1})
    mean = (8 * (1 - 2 / 21) + 10) / (2 - 2 / 21)
    assert meter.text() == f"loss {mean:.3f}, NT-Xent 4.000 (chance 4.84)"
    meter.add({"cluster": 1.5, "nt_xent_adversarial": 4.5})
    assert meter.text().endswith(", adversarial NT-Xent 4.500 (chance 4.84), cluster loss 1.500")
    assert meter.text(1) == f"loss {mean:.3f}" and meter.text(2, digits=1).startswith(f"loss {mean:.1f}, NT-Xent 4.0 (")
