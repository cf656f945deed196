"""CA2CL: how a step's gradient is computed on any engine (docs/mathematics.md).

Shapes: B local rows of a micro-batch, G rows of it over all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import Engine, ViewBatch, carry, embed_first, embed_second, parameters_of
from ca2cl.methods.ca2cl.adversary import perturbation, zero_perturbation
from ca2cl.methods.ca2cl.bitwise import bitwise_step
from ca2cl.methods.ca2cl.grad_cache import cached_step
from ca2cl.methods.ca2cl.losses import adversarial_term, clean_terms, weighted_sum
from ca2cl.methods.gather import Rows, all_sum, world
from ca2cl.models.batch_norm import commit_statistics
from ca2cl.models.heads import Embeddings


class CA2CL:
    """L1 + L2 of CA2CL, by one backward pass a micro-batch.

    L1 = NTXent(z1, z2) + lambda Cluster(g1, g2);  L2 = NTXent(z2, z_adv), z_adv the strong view through W + delta.

    The direction of delta needs L1's gradient before L2 is known. z1 has no part in L2, so the strong view is gone
    through once for both, the direction and L1's gradient of every parameter, and its graph is let go before the
    adversarial pass; the weak view is gone through twice, the first time for the direction alone. What is known by then
    enters the one backward as terms that are linear in it (``carry``): no engine sees a second backward.

    Args:
        config: the loss.
        accumulation: what several micro-batches mean. exact: the whole batch's loss, its gradient brought back to one
            micro-batch after another (``cached``); plain: the mean of the micro-batches' own losses; bitwise: exact, in
            units of work that do not depend on the hardware (``bitwise``). exact and bitwise hold where a micro-batch
            passes through the network as it would within the whole batch: not under norm sync, whose statistics are
            then the micro-batch's (``training.shares`` refuses it).
        unit: rows of such a unit, for bitwise.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        accumulation: Literal["exact", "plain", "bitwise"] = "exact",
        unit: int | None = None,
    ) -> None:
        self.config = config
        self.accumulation = accumulation
        self.unit = unit

    def step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        """Accumulate the gradient of one optimizer step.

        Returns:
            The step's terms as scalars, the same on every rank: loss, nt_xent, cluster, nt_xent_adversarial,
            mutual_information where it is on, and skipped_adversaries, a count.
        """
        if self.accumulation == "bitwise":
            assert self.unit is not None
            totals = bitwise_step(self._step, engine, micro_batches, self.unit)
        else:
            totals = self._step(engine, micro_batches)
        commit_statistics(engine.bare)
        return _reduced(totals)

    def _step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        if len(micro_batches) > 1 and self.accumulation != "plain":
            return cached_step(self.config, engine, micro_batches)
        return self._plain_step(engine, micro_batches)

    def _plain_step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for number in range(len(micro_batches)):
            with engine.micro_step(last=number == len(micro_batches) - 1):
                loss, terms = self._micro_step(engine, micro_batches[number])
                engine.backward(loss / len(micro_batches))
            for name, value in terms.items():
                share = value.detach() if name == "skipped_adversaries" else value.detach() / len(micro_batches)
                totals[name] = totals[name] + share if name in totals else share
        return totals

    def _micro_step(self, engine: Engine, views: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar with the gradient of this rank's share of one micro-batch's loss, and the loss's terms."""
        weight = engine.bare.encoder.conv1.weight
        delta = zero_perturbation(weight) if self.config.adversary else None
        rows = Rows.at(views.positions)
        # Through the wrapper goes the last pass before the backward and no other: a wrapper takes every pass through it
        # for the start of a backward of its own (DistributedDataParallel's reducer, DeepSpeed's hooks on outputs).
        first = embed_first(engine.bare, views, delta, record=True)
        last = engine.network if delta is None else engine.bare
        second = embed_second(last, views, delta, record=True)
        terms = clean_terms(first, second, rows, self.config)
        loss = weighted_sum(terms, self.config)
        terms["skipped_adversaries"] = loss.new_zeros(())
        if delta is None:
            return loss, {**terms, "loss": loss}
        gradient, carried = _first_half(loss, first, second, delta, engine)
        step, valid = perturbation(all_sum(gradient), weight, self.config.epsilon, self.config.epsilon_mode)
        perturbed = embed_first(engine.network, views, step, record=False)
        adversarial = adversarial_term(second.z, perturbed.z, rows, self.config)
        adversarial = torch.where(valid, adversarial, torch.zeros_like(adversarial))
        terms["nt_xent_adversarial"] = adversarial
        # a count, the same on every rank: divided by W because _reduced sums
        terms["skipped_adversaries"] = (~valid).to(loss.dtype) / world()[1]
        return carried + adversarial, {**terms, "loss": loss.detach() + adversarial}


def _first_half(
    loss: Tensor, first: Embeddings, second: Embeddings, delta: Tensor, engine: Engine
) -> tuple[Tensor, Tensor]:
    """L1's gradient with respect to delta on this rank, times the loss scale, and L1 as terms linear in what the last
    backward will reach: the weak view's embeddings, and the parameters, for the strong view's part.

    The strong view's graph is freed. Everything is summed over ranks inside the loss's own backward, once.
    """
    parameters, scale = parameters_of(engine), engine.loss_scale
    outer = torch.autograd.grad(loss * scale, [*first, *second], allow_unused=True)
    strong = [(e, grad) for e, grad in zip(first, outer[: len(first)], strict=True) if grad is not None]
    weak = [(e, grad) for e, grad in zip(second, outer[len(first) :], strict=True) if grad is not None]
    found = torch.autograd.grad(
        [e for e, _ in strong], [delta, *parameters], [grad for _, grad in strong], allow_unused=True
    )
    (other,) = torch.autograd.grad([e for e, _ in weak], delta, [grad for _, grad in weak], retain_graph=True)
    known = [(p, grad) for p, grad in zip(parameters, found[1:], strict=True) if grad is not None]
    assert found[0] is not None
    return found[0] + other, carry([*weak, *known], scale)


def _reduced(shares: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of every rank's shares, by one collective."""
    summed = all_sum(torch.stack([value.double() for value in shares.values()]))
    return dict(zip(shares, summed.unbind(), strict=True))
