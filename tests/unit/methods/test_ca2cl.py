"""The objective against the mathematics, written as slow loops."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.methods.ca2cl.adversary import perturbation
from ca2cl.methods.ca2cl.cluster_loss import cluster_loss, k_means, mutual_information
from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import nt_xent


def unit_rows(rows: int, dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, dim, generator=generator, dtype=torch.float64), dim=1)


def everywhere(rows: int) -> Rows:
    """One process has them all."""
    return Rows.at(torch.arange(rows))


def slow_nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> float:
    rows = [*z1, *z2]
    pairs = len(z1)
    total = 0.0
    for i, anchor in enumerate(rows):
        positive = rows[(i + pairs) % (2 * pairs)]
        others = sum(math.exp(float(anchor @ row) / temperature) for k, row in enumerate(rows) if k != i)
        total += -math.log(math.exp(float(anchor @ positive) / temperature) / others)
    return total / (2 * pairs)


@pytest.mark.parametrize("pairs", [1, 2, 5, 16])
@pytest.mark.parametrize("temperature", [0.1, 0.2, 1.0])
def test_nt_xent_is_the_papers_equation(pairs: int, temperature: float) -> None:
    z1, z2 = unit_rows(pairs, 6, 0), unit_rows(pairs, 6, 1)
    loss = nt_xent(z1, z2, everywhere(pairs), temperature)
    assert float(loss) == pytest.approx(slow_nt_xent(z1, z2, temperature), rel=1e-12)


def test_rows_in_any_order_have_the_same_loss_and_each_its_own_gradient() -> None:
    order = torch.tensor([5, 0, 3, 1, 7, 6, 2, 4])
    z1, z2 = (unit_rows(8, 6, seed).requires_grad_() for seed in (2, 3))
    expected = nt_xent(z1, z2, everywhere(8), 0.2)
    found = nt_xent(z1[order], z2[order], Rows.at(order), 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, [z1, z2]), torch.autograd.grad(expected, [z1, z2]), strict=True):
        torch.testing.assert_close(one, other)


def slow_k_means(g: Tensor, clusters: int, iterations: int) -> tuple[list[int], list[Tensor], list[int]]:
    centroids = [g[k].clone() for k in range(clusters)]
    assignments: list[int] = []
    for _ in range(iterations):
        assignments = []
        for row in g:
            distances = [float(((row - c) ** 2).sum()) for c in centroids]
            assignments.append(distances.index(min(distances)))
        for k in range(clusters):
            members = [g[i] for i, a in enumerate(assignments) if a == k]
            if members:
                centroids[k] = sum(members[1:], start=members[0]) / len(members)
    return assignments, centroids, [assignments.count(k) for k in range(clusters)]


@pytest.mark.parametrize(("rows", "clusters"), [(12, 3), (40, 10), (5, 5)])
def test_k_means_is_lloyds_algorithm_from_the_first_rows(rows: int, clusters: int) -> None:
    g = unit_rows(rows, 4, 4)
    found = k_means(g, clusters, 10)
    assignments, centroids, sizes = slow_k_means(g, clusters, 10)
    assert found.assignments.tolist() == assignments
    assert found.sizes.tolist() == sizes
    for k, centroid in enumerate(centroids):
        if sizes[k]:
            torch.testing.assert_close(found.centroids[k], centroid)


@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_k_means_of_fp32_rows_that_nearly_coincide_is_lloyds_algorithm(spread: float) -> None:
    """As when embeddings collapse: in fp32, |c|^2 - 2 g c is 84 % right at a spread of 1e-3, and a tenth at 3e-4."""
    centre = unit_rows(1, 32, 9)
    kinds = F.normalize(centre + spread * unit_rows(5, 32, 10), dim=1)
    g = F.normalize(kinds[torch.arange(60) * 7 % 5] + 0.3 * spread * unit_rows(60, 32, 11), dim=1).float()
    assert k_means(g, 5, 10).assignments.tolist() == slow_k_means(g.double(), 5, 10)[0]


def slow_cluster_loss(g1: Tensor, g2: Tensor, clusters: int, temperature: float) -> float:
    a1, c1, s1 = slow_k_means(g1, clusters, 10)
    a2, c2, s2 = slow_k_means(g2, clusters, 10)
    total = 0.0
    for g, a, c, s in ((g1, a2, c2, s2), (g2, a1, c1, s1)):
        for i, row in enumerate(g):
            terms = {k: math.exp(float(row @ c[k]) / temperature) for k in range(clusters) if s[k]}
            total += -math.log(terms[a[i]] / sum(terms.values())) / len(g)
    return total / 2


def test_cluster_loss_is_the_papers_equation() -> None:
    g1, g2 = unit_rows(30, 4, 5), unit_rows(30, 4, 6)
    loss = cluster_loss(g1, g2, k_means(g1, 6, 10), k_means(g2, 6, 10), 0.2)
    assert float(loss) == pytest.approx(slow_cluster_loss(g1, g2, 6, 0.2), rel=1e-12)


def test_mutual_information_is_finite_with_an_empty_cluster() -> None:
    """Three clusters of two kinds of rows: one has no members, and its column of the joint is 0."""
    for dtype in (torch.float32, torch.float64):
        g1 = unit_rows(2, 6, 8).to(dtype)[torch.tensor([0, 0, 1, 1, 0, 1])].requires_grad_()
        clusters = k_means(g1.detach(), 3, 10)
        assert (torch.bincount(clusters.assignments, minlength=3) == 0).any()
        value = mutual_information(g1, g1, clusters, clusters, 0.2)
        (gradient,) = torch.autograd.grad(value, g1)
        assert torch.isfinite(value) and value >= -1e-6 and torch.isfinite(gradient).all()


def test_an_empty_cluster_attracts_nothing() -> None:
    g = unit_rows(4, 3, 7)[[0, 0, 1, 1, 2, 3]]  # two equal starting rows: the second never wins a tie
    clusters = k_means(g, 3, 10)
    assert 0 in clusters.sizes.tolist()
    loss = cluster_loss(g, g, clusters, clusters, 0.2)
    assert float(loss) == pytest.approx(slow_cluster_loss(g, g, 3, 0.2), rel=1e-12)


def test_gradients_in_double_precision() -> None:
    def total(a1: Tensor, a2: Tensor, b1: Tensor, b2: Tensor) -> Tensor:
        z1, z2, g1, g2 = (F.normalize(x, dim=1) for x in (a1, a2, b1, b2))
        k1, k2 = k_means(g1, 3, 10), k_means(g2, 3, 10)
        information = mutual_information(g1, g2, k1, k2, 0.5)
        return nt_xent(z1, z2, everywhere(6), 0.2) + cluster_loss(g1, g2, k1, k2, 0.5) - information

    inputs = [unit_rows(6, 4, seed).requires_grad_() for seed in range(4)]
    assert torch.autograd.gradcheck(total, inputs)


def test_the_centroids_carry_gradient_and_the_assignments_do_not() -> None:
    g = unit_rows(12, 4, 8).requires_grad_()
    clusters = k_means(g, 3, 10)
    (gradient,) = torch.autograd.grad(clusters.centroids[0].sum(), g)
    members = clusters.assignments == 0
    torch.testing.assert_close(gradient[members], torch.full_like(gradient[members], 1 / int(members.sum())))
    assert not gradient[~members].any()


def test_mutual_information_is_zero_for_constants_and_log_k_for_agreement() -> None:
    corners = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    clusters = k_means(corners, 3, 10)
    assert float(mutual_information(corners, corners, clusters, clusters, 0.01)) == pytest.approx(math.log(3), rel=1e-6)
    assert float(mutual_information(corners, corners, clusters, clusters, 1e6)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("mode", "size"), [("absolute", 0.5), ("relative", 0.5 * 6.0)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_perturbation_has_the_stated_norm_in_the_gradients_direction(mode: str, size: float, scale: float) -> None:
    weight = torch.full((3, 3), 2.0)
    gradient = torch.arange(9.0).reshape(3, 3)
    delta, valid = perturbation(gradient * scale, weight, 0.5, mode)  # type: ignore[arg-type]
    assert bool(valid)
    torch.testing.assert_close(delta, size * gradient / gradient.norm())


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_no_direction_gives_no_perturbation(bad: float) -> None:
    delta, valid = perturbation(torch.full((2, 2), bad), torch.ones(2, 2), 1.0, "absolute")
    assert not bool(valid)
    assert not delta.any()


@pytest.mark.parametrize("logits_at_once", [1, 40, 64, 10**6])
def test_nt_xent_in_blocks_of_rows_is_nt_xent(logits_at_once: int) -> None:
    """Value and gradient, from one row at a time to all of them."""

    def total(a: Tensor, b: Tensor, at_once: int) -> Tensor:
        z1, z2 = F.normalize(a, dim=1), F.normalize(b, dim=1)
        return nt_xent(z1, z2, everywhere(10), 0.2, at_once)

    inputs = [unit_rows(10, 5, seed).requires_grad_() for seed in (0, 1)]
    expected, found = total(*inputs, 10**9), total(*inputs, logits_at_once)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for one, other in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_nt_xent_never_holds_more_logits_than_it_may() -> None:
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    z = unit_rows(64, 4, 0).requires_grad_()
    with Watch():
        nt_xent(z, z, everywhere(64), 0.2, 512).backward()
    assert largest <= 512
