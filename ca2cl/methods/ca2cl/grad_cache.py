"""Exact accumulation with the adversary, whose direction is one more round (docs/mathematics.md).

    1. no graph: z1, g1, z2, g2 of every micro-batch                    -> L1 and its gradient with respect to them
    2. again with graph, stem weight + delta, delta = 0                 -> dL1/d delta; the strong view's part of dL1
    3. no graph: z_adv of every micro-batch through W + delta           -> L2 and its gradient with respect to z2, z_adv
    4. again with graph: weak and perturbed strong view, one backward a micro-batch (sharded engines: one a pass)

Seven forward passes of a view for the direct step's three, and as many backward ones (three and a half).

Shapes: B local rows of the whole batch, b of a micro-batch, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import Engine, ViewBatch
from ca2cl.methods.ca2cl.adversary import perturbation, stem_weight, zero_perturbation
from ca2cl.methods.ca2cl.losses import adversarial_term, both_terms, first_terms
from ca2cl.methods.gather import all_sum
from ca2cl.methods.two_views import (
    Outer,
    Pair,
    Pass,
    carry_back,
    embed_all,
    embed_first,
    embed_second,
    gradients,
    leaf,
    outer_gradients,
    parameters_of,
)


def adversarial_exact_step(
    config: ObjectiveConfig, engine: Engine, micro_batches: Sequence[ViewBatch]
) -> dict[str, Tensor]:
    """Accumulate the gradient of one optimizer step over all micro-batches; returns this rank's share of the terms."""
    first, second, rows, sizes = embed_all(engine, micro_batches, slides=config.same_slide_weight != 1)
    terms = first_terms(first, second, rows, config)
    strong, weak = outer_gradients(terms["loss"], first, second, sizes, engine)
    weight = stem_weight(engine)
    gradient, known = _direction(engine, micro_batches, weight, strong, weak)
    step, valid = perturbation(all_sum(gradient), weight, config.epsilon, config.epsilon_mode)
    z_adv = _embed_adversarial(engine, micro_batches, step)
    adversarial = adversarial_term(second.z, z_adv, rows, valid, config)
    to_z2, to_z_adv = gradients(adversarial * engine.loss_scale, [second.z, z_adv])
    weak = [(z + more, g) for (z, g), more in zip(weak, torch.split(to_z2, sizes), strict=True)]
    _backward(engine, micro_batches, step, weak, torch.split(to_z_adv, sizes), known)
    return both_terms(terms, adversarial, valid)


def _direction(
    engine: Engine, micro_batches: Sequence[ViewBatch], weight: Tensor, strong: Outer, weak: Outer
) -> tuple[Tensor, list[Pair]]:
    """This rank's dL1/d delta, and dL1 of every parameter through the strong view, both times the loss scale.

    A sharded engine accumulates the latter at once.
    """
    delta = zero_perturbation(weight)
    parameters = [] if engine.sharded else parameters_of(engine)
    direction, known = torch.zeros_like(delta), [torch.zeros_like(p) for p in parameters]
    for number, views in enumerate(micro_batches):
        first = Pass(embed_first, views, strong[number], delta)
        if engine.sharded:
            carry_back(engine, [first], last=False)  # adds to delta's gradient, too
        else:
            outputs, outer = zip(*first.run(engine.bare), strict=True)
            found = torch.autograd.grad(outputs, [delta, *parameters], outer, allow_unused=True)
            assert found[0] is not None
            direction += found[0]
            for total, grad in zip(known, found[1:], strict=True):
                if grad is not None:
                    total += grad
        second = embed_second(engine.bare, views, delta, record=True)
        direction += torch.autograd.grad(list(second), delta, list(weak[number]))[0]
    if delta.grad is not None:
        direction += delta.grad
    return direction, list(zip(parameters, known, strict=True))


def _embed_adversarial(engine: Engine, micro_batches: Sequence[ViewBatch], step: Tensor) -> Tensor:
    with torch.no_grad():
        parts = [embed_first(engine.bare, views, step, record=False).z for views in micro_batches]
    return leaf(parts)


def _backward(
    engine: Engine,
    micro_batches: Sequence[ViewBatch],
    step: Tensor,
    weak: Outer,
    to_z_adv: Sequence[Tensor],
    known: list[Pair],
) -> None:
    """The weak view's part of L1 + L2 and the perturbed strong view's of L2; the last micro-batch takes ``known``."""
    for number, views in enumerate(micro_batches):
        last = number == len(micro_batches) - 1
        second = Pass(embed_second, views, weak[number], record=False)
        perturbed = Pass(embed_first, views, (to_z_adv[number], None), step, record=False)
        carry_back(engine, [second, perturbed], last=last, known=known if last else ())
