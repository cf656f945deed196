"""The terms of the loss over the global batch, from every rank's local rows.

Shapes: B local rows, G rows over all ranks, D embedding. Each function returns this rank's share: the sum over ranks is
the term, and its gradient with respect to the local rows is the whole term's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.model.heads import Embeddings
from ca2cl.objective.clusters import cluster_loss, k_means, mutual_information
from ca2cl.objective.gather import canonical_order, gather_rows, world
from ca2cl.objective.nt_xent import nt_xent


class Rows(NamedTuple):
    """How gathered rows are put in canonical order (``gather.canonical_order``), and where the local rows are in it."""

    order: Tensor
    own: Tensor

    @classmethod
    def at(cls, positions_B: Tensor) -> Rows:
        """From the local rows' places in the global batch; one collective."""
        return cls(*canonical_order(positions_B))

    def gather(self, *parts: Tensor) -> list[Tensor]:
        """Local (B, D) rows of several kinds as global (G, D) ones in canonical order, by one collective, so that the
        backward pass is one collective too."""
        rows = gather_rows(torch.cat(parts, dim=1))[self.order]
        return list(torch.split(rows, [part.shape[1] for part in parts], dim=1))


def clean_terms(first: Embeddings, second: Embeddings, rows: Rows, config: ObjectiveConfig) -> dict[str, Tensor]:
    """L1's terms by name: nt_xent, and those of the clusters where they are on."""
    z1, z2, g1, g2 = rows.gather(first.z, second.z, first.g, second.g)
    terms = {"nt_xent": nt_xent(first.z, second.z, z1, z2, rows.own, config.temperature)}
    if config.cluster_weight == 0 and config.mutual_information == 0:
        return terms
    clusters1, clusters2 = (k_means(g, config.clusters, config.lloyd_iterations) for g in (g1, g2))
    temperature = config.cluster_temperature
    terms["cluster"] = cluster_loss(first.g, second.g, clusters1, clusters2, rows.own, temperature)
    if config.mutual_information:
        # Every rank computes it whole, so each contributes one W-th.
        terms["mutual_information"] = mutual_information(g1, g2, clusters1, clusters2, temperature) / world()[1]
    return terms


def weighted_sum(terms: dict[str, Tensor], config: ObjectiveConfig) -> Tensor:
    """L1 of its terms."""
    weights = {"nt_xent": 1.0, "cluster": config.cluster_weight, "mutual_information": -config.mutual_information}
    parts = [weights[name] * value for name, value in terms.items() if weights[name]]
    return torch.stack(parts).sum()


def adversarial_term(z2_BD: Tensor, z_adv_BD: Tensor, rows: Rows, config: ObjectiveConfig) -> Tensor:
    """L2 = NTXent(z2, z_adv)."""
    z2, z_adv = rows.gather(z2_BD, z_adv_BD)
    return nt_xent(z2_BD, z_adv_BD, z2, z_adv, rows.own, config.temperature)
