"""Exact accumulation of the global batch's gradient over micro-batches (docs/mathematics.md).

The loss sees a tile only through its embeddings. So these are computed without graph for all micro-batches, the loss
and its gradient with respect to them once over the global batch, and each micro-batch is run again to carry that
gradient on to the parameters (GradCache, arXiv 2101.06983). The direction of the adversary is one more such round, and
takes L1's gradient through the strong view along, as the direct step does:

    1. no graph: z1, g1, z2, g2 of every micro-batch                    -> L1 and its gradient with respect to them
    2. again with graph, stem weight + delta, delta = 0                 -> dL1/d delta; the strong view's part of dL1
    3. no graph: z_adv of every micro-batch through W + delta           -> L2 and its gradient with respect to z2, z_adv
    4. again with graph: weak and perturbed strong view, one backward a micro-batch

Seven forward passes of a view for the direct step's three, and as many backward ones (three and a half); without the
adversary four for two. Views are pure functions of the tile, so a tile that is looked at again looks the same, and
running statistics are recorded in one pass of each view only. BatchNorm must not look beyond a group of rows that a
micro-batch holds whole: under norm sync this is another network's gradient, and ``training.shares`` refuses it.

Shapes: B local rows of the whole batch, b of a micro-batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import Engine, ViewBatch, carry, embed_first, embed_second, parameters_of
from ca2cl.methods.ca2cl.adversary import perturbation, zero_perturbation
from ca2cl.methods.ca2cl.losses import adversarial_term, clean_terms, weighted_sum
from ca2cl.methods.gather import Rows, all_sum, world
from ca2cl.models.heads import Embeddings

Pairs = list[tuple[Tensor, Tensor]]


def cached_step(config: ObjectiveConfig, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
    """Accumulate the gradient of one optimizer step over all micro-batches; returns this rank's share of the terms."""
    first, second, rows, sizes = _embed_all(engine, micro_batches)
    terms = clean_terms(first, second, rows, config)
    loss = weighted_sum(terms, config)
    outer = _gradients(loss * engine.loss_scale, [*first, *second])
    strong, weak = (_split(grads, sizes) for grads in (outer[:2], outer[2:]))
    terms["skipped_adversaries"] = loss.new_zeros(())
    if not config.adversary:
        _backward_clean(engine, micro_batches, strong, weak)
        return {**terms, "loss": loss}
    gradient, known = _direction(engine, micro_batches, strong, weak)
    weight = engine.bare.encoder.conv1.weight
    step, valid = perturbation(all_sum(gradient), weight, config.epsilon, config.epsilon_mode)
    z_adv = _embed_adversarial(engine, micro_batches, step)
    adversarial = adversarial_term(second.z, z_adv, rows, config)
    adversarial = torch.where(valid, adversarial, torch.zeros_like(adversarial))
    to_z2, to_z_adv = _gradients(adversarial * engine.loss_scale, [second.z, z_adv])
    weak = [(z + more, g) for (z, g), more in zip(weak, torch.split(to_z2, sizes), strict=True)]
    _backward_adversarial(engine, micro_batches, step, weak, torch.split(to_z_adv, sizes), known)
    terms["nt_xent_adversarial"] = adversarial
    terms["skipped_adversaries"] = (~valid).to(loss.dtype) / world()[1]
    return {**terms, "loss": loss.detach() + adversarial}


def _embed_all(engine: Engine, micro_batches: Sequence[ViewBatch]) -> tuple[Embeddings, Embeddings, Rows, list[int]]:
    """Both views' embeddings of all local rows as leaves of a new graph, their places, the micro-batches' sizes."""
    firsts, seconds, positions = [], [], []
    with torch.no_grad():
        for views in micro_batches:
            firsts.append(embed_first(engine.bare, views, None, record=False))
            seconds.append(embed_second(engine.bare, views, None, record=False))
            positions.append(views.positions)
    first, second = (Embeddings(*(_leaf(part) for part in zip(*parts, strict=True))) for parts in (firsts, seconds))
    return first, second, Rows.at(torch.cat(positions)), [len(part) for part in positions]


def _leaf(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)).requires_grad_()


def _gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where the loss does not reach: every parameter then gets a gradient, as DistributedDataParallel wants."""
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _split(grads: Sequence[Tensor], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The gradients with respect to z and g, a pair for each micro-batch."""
    z_grad, g_grad = grads
    return list(zip(torch.split(z_grad, sizes), torch.split(g_grad, sizes), strict=True))


def _direction(engine: Engine, micro_batches: Sequence[ViewBatch], strong: Pairs, weak: Pairs) -> tuple[Tensor, Pairs]:
    """This rank's dL1/d delta, and dL1 of every parameter through the strong view, both times the loss scale."""
    parameters, weight = parameters_of(engine), engine.bare.encoder.conv1.weight
    delta = zero_perturbation(weight)
    direction, known = torch.zeros_like(delta), [torch.zeros_like(p) for p in parameters]
    for number, views in enumerate(micro_batches):
        first = embed_first(engine.bare, views, delta, record=True)
        found = torch.autograd.grad(list(first), [delta, *parameters], list(strong[number]), allow_unused=True)
        assert found[0] is not None
        direction += found[0]
        for total, grad in zip(known, found[1:], strict=True):
            if grad is not None:
                total += grad
        second = embed_second(engine.bare, views, delta, record=True)
        direction += torch.autograd.grad(list(second), delta, list(weak[number]))[0]
    return direction, list(zip(parameters, known, strict=True))


def _embed_adversarial(engine: Engine, micro_batches: Sequence[ViewBatch], step: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [embed_first(engine.bare, views, step, record=False).z for views in micro_batches]
    return _leaf(parts)


def _backward_clean(engine: Engine, micro_batches: Sequence[ViewBatch], strong: Pairs, weak: Pairs) -> None:
    for number, views in enumerate(micro_batches):
        with engine.micro_step(last=number == len(micro_batches) - 1):
            first = embed_first(engine.bare, views, None, record=True)
            second = embed_second(engine.network, views, None, record=True)
            pairs = [*zip(first, strong[number], strict=True), *zip(second, weak[number], strict=True)]
            engine.backward(carry(pairs, engine.loss_scale))


def _backward_adversarial(
    engine: Engine,
    micro_batches: Sequence[ViewBatch],
    step: Tensor,
    weak: Pairs,
    to_z_adv: Sequence[Tensor],
    known: Pairs,
) -> None:
    """The weak view's part of L1 + L2 and the perturbed strong view's of L2; the last micro-batch takes ``known``."""
    for number, views in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        with engine.micro_step(last=last):
            second = embed_second(engine.bare, views, None, record=False)
            perturbed = embed_first(engine.network, views, step, record=False)
            pairs = [*zip(second, weak[number], strict=True), (perturbed.z, to_z_adv[number])]
            engine.backward(carry(pairs + known if last else pairs, engine.loss_scale))
