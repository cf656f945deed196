"""Gradient of CA2CL's step by docs/mathematics.md, one row after another through plain autograd.

Shapes: G rows of the global batch, S side of a view, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ca2cl.config import ObjectiveConfig
from tests.unit.methods.test_ca2cl import slow_k_means


def gradients(
    network: Any, x1: Tensor, x2: Tensor, objective: ObjectiveConfig, slides: Sequence[int] = ()
) -> dict[str, Tensor]:
    """The gradient of L with respect to every trained parameter.

    Args:
        network: without BatchNorm, drop path and buffers that training moves.
        x1: strong views (G, 3, S, S), in canonical order.
        x2: weak views.
        objective: without mutual information.
        slides: of the rows, where the objective weights negatives by them.
    """
    stem = next(name for name, p in network.named_parameters() if p is network.encoder.stem.weight)
    trained = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters() if p.requires_grad}

    def embed(x: Tensor, moved: Tensor | None = None) -> Any:
        weights = trained if moved is None else {**trained, stem: trained[stem] + moved}
        return functional_call(network, weights, (x,))

    first, second = embed(x1), embed(x2)
    weighted = slides, objective.same_slide_weight
    clean = nt_xent(first.z, second.z, objective.temperature, *weighted)
    clean = clean + objective.cluster_weight * cluster(first.g, second.g, objective)
    (direction,) = torch.autograd.grad(clean, trained[stem], retain_graph=True)
    size = objective.epsilon * (trained[stem].detach().norm() if objective.epsilon_mode == "relative" else 1.0)
    adversarial = embed(x1, size * direction / direction.norm())
    loss = clean + nt_xent(second.z, adversarial.z, objective.temperature, *weighted)
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def nt_xent(
    z1_GD: Tensor, z2_GD: Tensor, temperature: float, slides: Sequence[int] = (), weight: float = 1.0
) -> Tensor:
    """Anchor by anchor, negative by negative; those of the anchor's slide count ``weight`` times."""
    rows, pairs = [*z1_GD, *z2_GD], len(z1_GD)
    total = z1_GD.new_zeros(())
    for i, anchor in enumerate(rows):
        positive = (i + pairs) % len(rows)
        terms = [torch.exp(anchor @ rows[positive] / temperature)]
        for k, row in enumerate(rows):
            if k not in (i, positive):
                same = bool(slides) and slides[i % pairs] == slides[k % pairs]
                terms.append((weight if same else 1.0) * torch.exp(anchor @ row / temperature))
        total = total + torch.stack(terms).sum().log() - anchor @ rows[positive] / temperature
    return total / len(rows)


def cluster(g1_GD: Tensor, g2_GD: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Each view's rows against the other view's means, which carry the gradient of their members."""
    kinds = [slow_k_means(g.detach(), objective.clusters, objective.lloyd_iterations)[0] for g in (g1_GD, g2_GD)]
    total = g1_GD.new_zeros(())
    for g, others, kind in ((g1_GD, g2_GD, kinds[1]), (g2_GD, g1_GD, kinds[0])):
        means = {k: torch.stack([row for row, a in zip(others, kind, strict=True) if a == k]).mean(0) for k in {*kind}}
        for row, a in zip(g, kind, strict=True):
            logits = torch.stack([row @ mean / objective.cluster_temperature for mean in means.values()])
            total = total + logits.exp().sum().log() - row @ means[a] / objective.cluster_temperature
    return total / (2 * len(g1_GD))
