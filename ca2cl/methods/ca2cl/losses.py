"""Loss terms over the global batch, from every rank's rows.

Shapes: B local rows, G rows over all ranks, D embedding. Each function returns this rank's share: the sum over ranks is
the term, and its gradient with respect to the local rows is the whole term's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.ca2cl.cluster_loss import cluster_loss, k_means, mutual_information
from ca2cl.methods.gather import Rows, world
from ca2cl.methods.nt_xent import nt_xent
from ca2cl.methods.same_slide import same_slide_terms
from ca2cl.methods.surrogate import given_gradient
from ca2cl.models.heads import Embeddings


def first_terms(first: Embeddings, second: Embeddings, rows: Rows, config: ObjectiveConfig) -> dict[str, Tensor]:
    """L1 as ``loss``, its terms, no adversary that was skipped, and the same-slide negatives where they are weighted.

    Args:
        first: embeddings of the strong views.
        second: of the weak views.
        rows: of all ranks.
        config: weights and temperatures.
    """
    terms = clean_terms(first, second, rows, config)
    loss = weighted_sum(terms, config)
    counts = {"skipped_adversaries": loss.new_zeros(()), **same_slide_terms(rows, config.same_slide_weight)}
    return {**terms, **counts, "loss": loss}


def both_terms(terms: dict[str, Tensor], adversarial: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The terms of L1 + L2: those of ``first_terms`` and L2, which is 0 unless ``valid``."""
    others = {name: value for name, value in terms.items() if name != "loss"}
    # a count, the same on every rank: divided by W because the step sums over ranks
    others["skipped_adversaries"] = (~valid).to(adversarial.dtype) / world()[1]
    return {**others, "nt_xent_adversarial": adversarial, "loss": terms["loss"].detach() + adversarial}


def clean_terms(first: Embeddings, second: Embeddings, rows: Rows, config: ObjectiveConfig) -> dict[str, Tensor]:
    """L1's terms by name: nt_xent, and those of the clusters where they are on.

    Args:
        first: embeddings of the strong views.
        second: of the weak views.
        rows: of all ranks.
        config: weights and temperatures.
    """
    terms = {"nt_xent": _nt_xent(first.z, second.z, rows, config)}
    if config.cluster_weight or config.mutual_information:
        return terms | cluster_terms(first.g, second.g, rows, config)
    # DistributedDataParallel wants a gradient for every parameter, those of the group head too
    nothing = given_gradient(terms["nt_xent"].new_zeros(()), [(g, torch.zeros_like(g)) for g in (first.g, second.g)])
    return {"nt_xent": terms["nt_xent"] + nothing}


def _nt_xent(z1_BD: Tensor, z2_BD: Tensor, rows: Rows, config: ObjectiveConfig) -> Tensor:
    return nt_xent(z1_BD, z2_BD, rows, config.temperature, same_slide_weight=config.same_slide_weight)


def cluster_terms(g1_BD: Tensor, g2_BD: Tensor, rows: Rows, config: ObjectiveConfig) -> dict[str, Tensor]:
    """The terms of the clusters by name.

    Every rank computes them whole, contributes a W-th of the value, and keeps its own rows of the gradient.
    """
    temperature = config.cluster_temperature
    with torch.enable_grad():
        g1_GD, g2_GD = (g.requires_grad_() for g in rows.gather(g1_BD, g2_BD))
        clusters1, clusters2 = (k_means(g, config.clusters, config.lloyd_iterations) for g in (g1_GD, g2_GD))
        terms = {"cluster": cluster_loss(g1_GD, g2_GD, clusters1, clusters2, temperature)}
        if config.mutual_information:
            terms["mutual_information"] = mutual_information(g1_GD, g2_GD, clusters1, clusters2, temperature)
    return {name: _own_share(term, [g1_GD, g2_GD], [g1_BD, g2_BD], rows) for name, term in terms.items()}


def _own_share(term: Tensor, wholes: list[Tensor], local: list[Tensor], rows: Rows) -> Tensor:
    gradients = torch.autograd.grad(term, wholes, retain_graph=True)
    share = term.double() / world()[1]
    return given_gradient(share, [(x, grad[rows.own]) for x, grad in zip(local, gradients, strict=True)])


def weighted_sum(terms: dict[str, Tensor], config: ObjectiveConfig) -> Tensor:
    """L1 of its terms."""
    weights = {"nt_xent": 1.0, "cluster": config.cluster_weight, "mutual_information": -config.mutual_information}
    parts = [weights[name] * value for name, value in terms.items() if weights[name]]
    return torch.stack(parts).sum()


def adversarial_term(z2_BD: Tensor, z_adv_BD: Tensor, rows: Rows, valid: Tensor, config: ObjectiveConfig) -> Tensor:
    """L2 = NTXent(z2, z_adv), or 0 where the adversary had no direction.

    Args:
        z2_BD: projections of the weak views.
        z_adv_BD: of the strong views under the perturbation.
        rows: of all ranks.
        valid: whether there was a direction, a scalar.
        config: the temperature, and the weight of same-slide negatives.
    """
    found = _nt_xent(z2_BD, z_adv_BD, rows, config)
    return torch.where(valid, found, torch.zeros_like(found))
