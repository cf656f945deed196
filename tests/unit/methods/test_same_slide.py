"""NT-Xent with a weight of same-slide negatives, against slow loops in double precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.errors import InputError
from ca2cl.methods.base import LocalEngine, MethodSettings, ViewBatch
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.distill.method import Distill
from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import nt_xent
from ca2cl.methods.same_slide import same_slide_terms
from ca2cl.methods.simclr import SimCLR
from ca2cl.models.backbone import build_encoder
from tests.support import step_oracle
from tests.support.fake_gpu import fake_cuda, strict_meta
from tests.unit.methods.test_ca2cl import unit_rows

SLIDES = torch.tensor([7, 7, -3, 5, 7, -3, 9, 5, 7, 2])


def rows_of(slides: Tensor) -> Rows:
    return Rows.at(torch.arange(len(slides)), slides)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("at_once", [1, 64, 10**6])
def test_value_and_gradient_are_those_of_slow_loops(weight: float, at_once: int) -> None:
    z1, z2 = (unit_rows(10, 6, seed).requires_grad_() for seed in (0, 1))
    expected = step_oracle.nt_xent(z1, z2, 0.2, SLIDES.tolist(), weight)
    found = nt_xent(z1, z2, rows_of(SLIDES), 0.2, at_once, same_slide_weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, [z1, z2]), torch.autograd.grad(expected, [z1, z2]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)


def test_the_weight_is_between_masking_and_none() -> None:
    z1, z2 = (unit_rows(10, 6, seed) for seed in (0, 1))
    values = [float(nt_xent(z1, z2, rows_of(SLIDES), 0.2, same_slide_weight=w)) for w in (0.0, 0.1, 0.6, 1.0)]
    assert values == sorted(values) and len(set(values)) == 4


def test_weight_1_and_slides_of_one_tile_are_nt_xent_to_the_last_bit() -> None:
    z1, z2 = (unit_rows(10, 6, seed).float().requires_grad_() for seed in (0, 1))
    plain = nt_xent(z1, z2, Rows.at(torch.arange(10)), 0.2)
    expected = torch.autograd.grad(plain, [z1, z2])
    for slides, weight in ((SLIDES, 1.0), (torch.arange(10), 0.3), (torch.arange(10), 0.0)):
        found = nt_xent(z1, z2, rows_of(slides), 0.2, same_slide_weight=weight)
        assert torch.equal(found, plain)
        pairs = zip(torch.autograd.grad(found, [z1, z2]), expected, strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_rows_in_any_order_keep_their_slides() -> None:
    order = torch.tensor([5, 0, 3, 9, 1, 7, 6, 2, 4, 8])
    z1, z2 = (unit_rows(10, 6, seed).requires_grad_() for seed in (2, 3))
    expected = nt_xent(z1, z2, rows_of(SLIDES), 0.2, same_slide_weight=0.3)
    found = nt_xent(z1[order], z2[order], Rows.at(order, SLIDES[order]), 0.2, same_slide_weight=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, [z1, z2]), torch.autograd.grad(expected, [z1, z2]), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 10**6])
def test_anchors_without_negatives_have_no_loss_and_are_counted(dtype: torch.dtype, at_once: int) -> None:
    slides = torch.full((6,), 4)
    z1, z2 = (unit_rows(6, 5, seed).to(dtype).requires_grad_() for seed in (0, 1))
    loss = nt_xent(z1, z2, rows_of(slides), 0.2, at_once, same_slide_weight=0.0)
    assert loss.detach() == 0
    assert all(float(grad.abs().max()) < 1e-6 for grad in torch.autograd.grad(loss, [z1, z2]))
    assert same_slide_terms(rows_of(slides), 0.0)["anchors_without_negatives"] == 12
    assert same_slide_terms(rows_of(SLIDES), 0.0)["anchors_without_negatives"] == 0


def test_the_share_of_same_slide_negatives_is_counted() -> None:
    slides, pairs = [*SLIDES.tolist()] * 2, len(SLIDES)
    anchors = range(2 * pairs)
    others = [(i, k) for i in anchors for k in anchors if k not in (i, (i + pairs) % (2 * pairs))]
    share = sum(slides[i] == slides[k] for i, k in others) / len(others)
    found = same_slide_terms(rows_of(SLIDES), 0.3)
    assert [*found] == ["same_slide_negatives"]
    assert float(found["same_slide_negatives"]) == pytest.approx(share, rel=1e-12)
    assert same_slide_terms(Rows.at(torch.arange(10)), 0.3) == {}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_both_methods_use_it_in_every_nt_xent(weight: float) -> None:
    """Value of each term from the embeddings, with identity in place of an encoder that could hide the weight."""
    torch.manual_seed(0)
    x1, x2 = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32)
    slides = torch.tensor([1, 1, 2, 2, 2, 3])
    batch = ViewBatch(x1, x2, torch.arange(6), slides=slides)
    objective = ObjectiveConfig(clusters=2, epsilon=0.3, same_slide_weight=weight)
    for method in (CA2CL(objective), SimCLR.from_settings(MethodSettings(objective))):
        torch.manual_seed(1)
        network = method.build(build_encoder("timm:test_vit", image_size=32)).eval()
        terms = method.step(LocalEngine(network), [batch])
        first, second = network(x1), network(x2)
        z1, z2 = (found.z.detach().double() for found in (first, second))
        expected = float(step_oracle.nt_xent(z1, z2, 0.2, slides.tolist(), weight))
        name = "nt_xent" if "nt_xent" in terms else "loss"
        assert float(terms[name].detach()) == pytest.approx(expected, rel=1e-5)
        assert ("same_slide_negatives" in terms) == (weight != 1)
        assert ("anchors_without_negatives" in method.counters) == (weight == 0)
        assert method.counters.keys() <= terms.keys()


def test_other_weights_are_refused() -> None:
    for weight in (-0.1, 1.5, math.nan):
        with pytest.raises(InputError, match=r"objective\.same_slide_weight is"):
            ObjectiveConfig(same_slide_weight=weight)
    with pytest.raises(InputError, match="objective.same_slide_weight is 0.3: method.name distill has no negatives"):
        Distill.from_settings(MethodSettings(ObjectiveConfig(same_slide_weight=0.3)))


def test_gradients_in_double_precision() -> None:
    def total(a1: Tensor, a2: Tensor) -> Tensor:
        z1, z2 = (F.normalize(x, dim=1) for x in (a1, a2))
        return nt_xent(z1, z2, rows_of(SLIDES[:6]), 0.2, same_slide_weight=0.3)

    assert torch.autograd.gradcheck(total, [unit_rows(6, 4, seed).requires_grad_() for seed in range(2)])


@pytest.mark.parametrize("place", [fake_cuda, strict_meta])
def test_it_stays_on_the_device(place: Callable[[], AbstractContextManager[torch.device]]) -> None:
    with place() as gpu:
        z1, z2 = (torch.ones(10, 6, device=gpu, requires_grad=True) for _ in range(2))
        rows = Rows.at(torch.arange(10).to(gpu), SLIDES.to(gpu))
        loss = nt_xent(z1, z2, rows, 0.2, same_slide_weight=0.0)
        assert {x.device for x in (loss, *same_slide_terms(rows, 0.0).values())} == {z1.device}
