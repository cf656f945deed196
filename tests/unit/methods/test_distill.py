"""Distillation against its definition: the losses as slow loops, the teacher's input, the options."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ObjectiveConfig
from ca2cl.errors import InputError
from ca2cl.methods.base import LocalEngine, MethodSettings, Tiles, ViewBatch
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.distill.losses import feature_term, relational_term
from ca2cl.methods.distill.method import DistillBatch, DistillOptions
from ca2cl.methods.gather import Rows
from ca2cl.methods.registry import build_method
from ca2cl.methods.simclr import SimCLR, SimCLRNetwork
from ca2cl.models.backbone import build_encoder
from ca2cl.models.heads import Network
from ca2cl.models.preprocess import preprocess
from ca2cl.pretrain.teacher import LiveTeacher


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def slow_relational(h: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The mean Kullback-Leibler divergence of similarities, row by row and column by column."""
    total = h.new_zeros(())
    for i in range(len(h)):
        others = [k for k in range(len(h)) if k != i]
        own, teachers = ([torch.dot(x[i], x[k]) / temperature for k in others] for x in (h, t))
        log_p, log_q = ([one - torch.stack(logits).exp().sum().log() for one in logits] for logits in (own, teachers))
        for p, q in zip(log_p, log_q, strict=True):
            total = total + q.exp() * (q - p)
    return total / len(h)


def slow_feature(p: Tensor, t: Tensor, kind: str) -> Tensor:
    rows = [
        1 - sum(a * b for a, b in zip(x, y, strict=True))
        if kind == "cosine"
        else sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(p, t, strict=True)
    ]
    return torch.stack(rows).mean()  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [2, 5, 16])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
def test_the_relational_loss_is_a_slow_loop_in_value_and_gradient(rows: int, temperature: float, at_once: int) -> None:
    h, t = unit_rows(rows, 6, 0).requires_grad_(), unit_rows(rows, 9, 1)
    expected = slow_relational(h, t, temperature)
    found = relational_term(h, t, Rows.at(torch.arange(rows)), temperature, at_once)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(found, h)[0], torch.autograd.grad(expected, h)[0], rtol=1e-9, atol=1e-12
    )


def test_a_student_with_the_teachers_geometry_has_no_relational_loss() -> None:
    t = unit_rows(8, 6, 2)
    turned = t @ torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    rows = Rows.at(torch.arange(8))
    assert float(relational_term(turned, t, rows, 0.1)) == pytest.approx(0, abs=1e-12)
    assert float(relational_term(unit_rows(8, 6, 3), t, rows, 0.1)) > 0.1


@pytest.mark.parametrize("kind", ["cosine", "l2"])
def test_the_feature_loss_is_a_slow_loop_in_value_and_gradient(kind: Any) -> None:
    p, t = unit_rows(5, 7, 0).requires_grad_(), unit_rows(5, 7, 1)
    expected, found = slow_feature(p, t, kind), feature_term(p, t, Rows.at(torch.arange(5)), kind)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(found, p)[0], torch.autograd.grad(expected, p)[0])


def test_rows_in_any_order_have_the_same_loss_and_each_its_own_gradient() -> None:
    order = torch.tensor([5, 0, 3, 1, 7, 6, 2, 4])
    h, t = unit_rows(8, 6, 2).requires_grad_(), unit_rows(8, 9, 3)
    expected = relational_term(h, t, Rows.at(torch.arange(8)), 0.2)
    found = relational_term(h[order], t[order], Rows.at(order), 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, h)[0], torch.autograd.grad(expected, h)[0])


class Known:
    """A teacher whose features of a view are a fixed projection of its pixels."""

    feature_dim = 5

    def known(self, tiles: Tiles) -> None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        weight = torch.randn(self.feature_dim, x[0].numel(), generator=torch.Generator().manual_seed(7))
        return F.normalize(x.flatten(1).float() @ weight.T, dim=1)


def distill(*options: str, accumulation: Any = "exact") -> Any:
    method = build_method("distill", MethodSettings(accumulation=accumulation), options)
    method.take_teacher(Known())
    return method


@pytest.mark.parametrize("options", [(), ("feature_loss=l2", "projector=mlp", "feature_weight=0.5"), ("view=strong",)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_step_has_the_slow_loops_gradient(options: tuple[str, ...], micro_batches: int) -> None:
    torch.manual_seed(0)
    method = distill(*options, "relational_weight=2", "temperature=0.5")
    network = method.build(build_encoder("resnet18", "frozen")).train()
    x, settings = torch.randn(6, 3, 32, 32), method.settings
    found, targets = network(x), Known()(x)
    feature = slow_feature(found.p, targets, settings.feature_loss)
    relational = slow_relational(found.h, targets, 0.5)
    expected = settings.feature_weight * feature + 2 * relational
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(expected, list(parameters.values()))

    batches = [DistillBatch(x[rows], rows, None) for rows in torch.arange(6).split(6 // micro_batches)]
    terms = method.step(LocalEngine(network), batches)
    assert float(terms["loss"]) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert float(terms["relational"]) == pytest.approx(float(relational.detach()), rel=1e-4)
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        assert parameter.grad is not None
        assert float((parameter.grad - gradient).norm() / gradient.norm().clamp(min=1e-9)) < 1e-3, name


def test_a_student_leaves_out_the_branches_of_its_views_words() -> None:
    torch.manual_seed(0)
    method = distill("view=strong")
    network = method.build(build_encoder("timm:test_vit", image_size=32, drop_path=0.5)).train()
    pixels, rows = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.arange(4)
    words = torch.randint(-(2**63), 2**63 - 1, (2, 4))
    views = SimpleNamespace(strong=lambda *_: torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    batch = method.views(Tiles(pixels, rows, 0, rows, None, words), views)
    assert torch.equal(batch.words, words[0])
    whole, halves = (
        method.step(LocalEngine(copy.deepcopy(network)), [_rows(batch, part) for part in rows.split(size)])
        for size in (4, 2)
    )
    torch.testing.assert_close(halves, whole)


def _rows(batch: DistillBatch, rows: Tensor) -> DistillBatch:
    assert batch.words is not None
    return DistillBatch(batch.x[rows], batch.positions[rows], None, batch.words[rows])


def test_plain_accumulation_compares_the_rows_of_a_micro_batch_only() -> None:
    torch.manual_seed(0)
    x, losses = torch.randn(6, 3, 32, 32), []
    network = distill().build(build_encoder("resnet18", "frozen")).train()
    for kind in ("exact", "plain"):
        batches = [DistillBatch(x[rows], rows, None) for rows in torch.arange(6).split(3)]
        losses.append(distill(accumulation=kind).step(LocalEngine(copy.deepcopy(network)), batches))
    assert float(losses[0]["feature"]) == pytest.approx(float(losses[1]["feature"]), rel=1e-6)
    assert abs(float(losses[0]["relational"] - losses[1]["relational"])) > 0.01


def test_without_the_relational_loss_only_the_feature_loss_is_left() -> None:
    torch.manual_seed(0)
    method = distill("relational_weight=0")
    network = method.build(build_encoder("resnet18", "frozen")).train()
    terms = method.step(LocalEngine(network), [DistillBatch(torch.randn(4, 3, 32, 32), torch.arange(4), None)])
    assert set(terms) == {"feature", "loss"} and terms["loss"] == terms["feature"]


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("view=both", "method.options has view = 'both': use weak or strong"),
        ("projector=conv", "use linear or mlp"),
        ("temperature=0", "temperature = 0.0: use more than 0"),
        ("feature_weight=-1", "feature_weight = -1.0: use 0 or more"),
        ("teacher_size=8", "teacher_size = 8: use 32 or more"),
        ("tempreature=1", "did you mean temperature?"),
    ],
)
def test_a_wrong_option_is_one_line(option: str, line: str) -> None:
    with pytest.raises(InputError, match=line.replace("?", r"\?")):
        build_method("distill", MethodSettings(), [option])
    with pytest.raises(InputError, match="one of the weights must not be 0"):
        DistillOptions(feature_weight=0, relational_weight=0)


def test_the_teacher_sees_the_view_by_its_own_normalisation_and_size() -> None:
    """A view without augmentation gives what probe and embed would see of the tile."""
    torch.manual_seed(0)
    encoder = build_encoder("resnet18").eval()
    tiles = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    student, own = ((0.7, 0.5, 0.6), (0.2, 0.3, 0.25)), (IMAGENET_MEAN, IMAGENET_STD)
    teacher = LiveTeacher(encoder, 512, 64, student, own)
    with torch.no_grad():
        expected = F.normalize(encoder(preprocess(tiles, 64, *own)), dim=1)
    found = teacher(preprocess(tiles, 48, *student))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found.requires_grad
    same = LiveTeacher(encoder, 512, 48, own, own)(preprocess(tiles, 48, *own))
    assert float((same - expected).norm()) > 1e-2, "the size matters"


def test_the_teachers_rows_go_in_units_whose_results_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(0)
    normalisation = (IMAGENET_MEAN, IMAGENET_STD)
    teacher = LiveTeacher(build_encoder("resnet18").eval(), 512, 32, normalisation, normalisation, unit=2)
    x = torch.randn(8, 3, 32, 32)
    assert torch.equal(teacher(x), torch.cat([teacher(rows) for rows in x.split(4)]))


def test_ca2cl_without_clusters_and_adversary_is_simclr() -> None:
    """The recipe simclr names the method that is the same loss."""
    torch.manual_seed(0)
    ours = Network(build_encoder("resnet18", "frozen"), 16).train()
    theirs = SimCLRNetwork(ours.encoder, 16).train()
    theirs.projector = ours.projector
    x1, x2 = torch.randn(6, 3, 32, 32), torch.randn(6, 3, 32, 32)
    batch = ViewBatch(x1, x2, torch.arange(6))
    gradients, losses = [], []
    for method, network in (
        (CA2CL(ObjectiveConfig(cluster_weight=0, adversary=False)), ours),
        (SimCLR(), theirs),
    ):
        losses.append(float(method.step(LocalEngine(network), [batch])["loss"]))
        gradients.append({name: p.grad for name, p in network.named_parameters()})
        network.zero_grad(set_to_none=True)
    assert losses[0] == losses[1] and math.isfinite(losses[0])
    assert all(torch.equal(gradients[0][name], grad) for name, grad in gradients[1].items())
