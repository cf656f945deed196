"""CA2CL as a method: how a step's gradient is made, whatever the engine (DESIGN.md 3.1).

Shapes: B local rows of a micro-batch, G rows of it over all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.model.heads import Embeddings, Network
from ca2cl.objective.adversary import perturbation
from ca2cl.objective.clusters import cluster_loss, k_means, mutual_information
from ca2cl.objective.gather import all_sum, canonical_order, gather_rows, world
from ca2cl.objective.nt_xent import nt_xent


class ViewBatch(NamedTuple):
    """Two views of a micro-batch, (B, 3, S, S) each, and its rows' places in the global batch, (B,) int64."""

    x1: Tensor
    x2: Tensor
    positions: Tensor


class Engine(Protocol):
    """What a method needs of whatever carries its gradient."""

    @property
    def network(self) -> torch.nn.Module:
        """The wrapped network: call it like ``Network``."""

    @property
    def bare(self) -> Network:
        """The network inside the wrapper."""

    @property
    def loss_scale(self) -> float:
        """The factor by which fp16 training multiplies a loss before its backward; 1 otherwise."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a micro-batch's passes; gradients are exchanged in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``, averaged over ranks."""


@dataclass(frozen=True)
class _Gathered:
    z1: Tensor
    z2: Tensor
    g1: Tensor
    g2: Tensor
    order: Tensor
    own: Tensor


class CA2CL:
    """L1 + L2 of CA2CL, by one backward pass a micro-batch.

    L1 = NTXent(z1, z2) + lambda Cluster(g1, g2);  L2 = NTXent(z2, z_adv), z_adv the strong view through W + delta.

    The direction of delta needs L1's gradient before L2 is known. z1 has no part in L2, so the strong view is gone
    through once for both, the direction and L1's gradient of every parameter, and its graph is let go before the
    adversarial pass; the weak view is gone through twice, the first time for the direction alone. What is known by then
    enters the one backward as terms that are linear in it (``_carry``): no engine sees a second backward.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        self.config = config

    def step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        """Accumulate the gradient of one optimizer step.

        Returns:
            The step's terms as fp32 scalars, the same on every rank: loss, nt_xent, cluster, nt_xent_adversarial,
            mutual_information where it is on, and skipped_adversaries, a count.
        """
        totals: dict[str, Tensor] = {}
        for number, views in enumerate(micro_batches):
            with engine.micro_step(last=number == len(micro_batches) - 1):
                loss, terms = self._micro_step(engine, views)
                engine.backward(loss * (world()[1] / len(micro_batches)))
            for name, value in terms.items():
                share = value.detach() if name == "skipped_adversaries" else value.detach() / len(micro_batches)
                totals[name] = totals[name] + share if name in totals else share
        return _reduced(totals)

    def _micro_step(self, engine: Engine, views: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """A scalar with the gradient of this rank's share of one micro-batch's loss, and the loss's terms."""
        weight = engine.bare.encoder.conv1.weight
        delta = torch.zeros_like(weight, requires_grad=True) if self.config.adversary else None
        first: Embeddings = engine.network(views.x1, delta)
        second: Embeddings = engine.network(views.x2, delta)
        gathered = _gather(first, second, views.positions)
        terms = self._clean_terms(first, second, gathered)
        loss = sum(self._weighted(terms), start=first.z.new_zeros(()))
        terms["skipped_adversaries"] = loss.new_zeros(())
        if delta is None:
            return loss, {**terms, "loss": loss}
        gradient, carried = _first_half(loss, first, second, delta, engine)
        step, valid = perturbation(all_sum(gradient), weight, self.config.epsilon, self.config.epsilon_mode)
        adversarial = self._adversarial_term(engine, views, step, second, gathered)
        adversarial = torch.where(valid, adversarial, torch.zeros_like(adversarial))
        terms["nt_xent_adversarial"] = adversarial
        # a count, the same on every rank: divided by W because _reduced sums
        terms["skipped_adversaries"] = (~valid).to(loss.dtype) / world()[1]
        return carried + adversarial, {**terms, "loss": loss.detach() + adversarial}

    def _clean_terms(self, first: Embeddings, second: Embeddings, all_rows: _Gathered) -> dict[str, Tensor]:
        config = self.config
        terms = {"nt_xent": nt_xent(first.z, second.z, all_rows.z1, all_rows.z2, all_rows.own, config.temperature)}
        if config.cluster_weight == 0 and config.mutual_information == 0:
            return terms
        clusters1 = k_means(all_rows.g1, config.clusters, config.lloyd_iterations)
        clusters2 = k_means(all_rows.g2, config.clusters, config.lloyd_iterations)
        temperature = config.cluster_temperature
        terms["cluster"] = cluster_loss(first.g, second.g, clusters1, clusters2, all_rows.own, temperature)
        if config.mutual_information:
            # Every rank computes it whole, so each contributes one W-th.
            whole = mutual_information(all_rows.g1, all_rows.g2, clusters1, clusters2, temperature)
            terms["mutual_information"] = whole / world()[1]
        return terms

    def _weighted(self, terms: dict[str, Tensor]) -> list[Tensor]:
        weights = {
            "nt_xent": 1.0,
            "cluster": self.config.cluster_weight,
            "mutual_information": -self.config.mutual_information,
        }
        return [weights[name] * value for name, value in terms.items() if weights[name]]

    def _adversarial_term(
        self, engine: Engine, views: ViewBatch, step: Tensor, second: Embeddings, all_rows: _Gathered
    ) -> Tensor:
        perturbed: Embeddings = engine.network(views.x1, step, update_statistics=False)
        # z2 is gathered anew, beside z_adv: the first gathering's graph leads back to the strong view's, which is gone.
        rows = gather_rows(torch.cat((second.z, perturbed.z), dim=1))[all_rows.order]
        z2, z_adv = rows.chunk(2, dim=1)
        return nt_xent(second.z, perturbed.z, z2, z_adv, all_rows.own, self.config.temperature)


def _first_half(
    loss: Tensor, first: Embeddings, second: Embeddings, delta: Tensor, engine: Engine
) -> tuple[Tensor, Tensor]:
    """L1's gradient with respect to delta on this rank, times the loss scale, and L1 as terms linear in what the last
    backward will reach: the weak view's embeddings, and the parameters, for the strong view's part.

    The strong view's graph is freed. Everything is summed over ranks inside the loss's own backward, once.
    """
    parameters = [p for p in engine.bare.parameters() if p.requires_grad]
    scale = engine.loss_scale
    outer = torch.autograd.grad(loss * scale, [*first, *second], allow_unused=True)
    strong = [(e, grad) for e, grad in zip(first, outer[: len(first)], strict=True) if grad is not None]
    weak = [(e, grad) for e, grad in zip(second, outer[len(first) :], strict=True) if grad is not None]
    found = torch.autograd.grad(
        [e for e, _ in strong], [delta, *parameters], [grad for _, grad in strong], allow_unused=True
    )
    (other,) = torch.autograd.grad([e for e, _ in weak], delta, [grad for _, grad in weak], retain_graph=True)
    known = [(p, grad) for p, grad in zip(parameters, found[1:], strict=True) if grad is not None]
    assert found[0] is not None
    return found[0] + other, _carry([*weak, *known], scale)


def _carry(pairs: Sequence[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """A scalar whose gradient with respect to each tensor is the given one over ``scale``."""
    parts = [(tensor * (grad.detach() / scale)).sum() for tensor, grad in pairs]
    return torch.stack(parts).sum()


def _gather(first: Embeddings, second: Embeddings, positions_B: Tensor) -> _Gathered:
    """All embeddings of the global batch by one collective, so that its backward is one collective too."""
    order, own = canonical_order(positions_B)
    parts = (first.z, second.z, first.g, second.g)
    rows = gather_rows(torch.cat(parts, dim=1))[order]
    z1, z2, g1, g2 = torch.split(rows, [part.shape[1] for part in parts], dim=1)
    return _Gathered(z1, z2, g1, g2, order, own)


def _reduced(shares: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sum of every rank's shares, by one collective."""
    summed = all_sum(torch.stack([value.float() for value in shares.values()]))
    return dict(zip(shares, summed.unbind(), strict=True))
