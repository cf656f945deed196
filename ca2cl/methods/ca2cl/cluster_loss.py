"""Cluster loss from k-means inside the batch (CA2CL, section III).

Everything here is of the global batch, which every rank has gathered: it is small work, done on all of them alike.

Shapes: G global batch, D embedding, K clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Clusters(NamedTuple):
    """Assignments (G,) int64, centroids (K, D) with gradient, and sizes (K,)."""

    assignments: Tensor
    centroids: Tensor
    sizes: Tensor


def _means(g_GD: Tensor, assignments_G: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    member_KG = F.one_hot(assignments_G, clusters).to(g_GD.dtype).T
    sizes_K = member_KG.sum(1)
    return member_KG @ g_GD / sizes_K.clamp(min=1)[:, None], sizes_K


def k_means(g_GD: Tensor, clusters: int, iterations: int) -> Clusters:
    """Lloyd's algorithm from the first K rows, squared Euclidean distance.

    Assignments carry no gradient; the centroids are the mean of their members, through which the gradient flows. An
    empty cluster keeps its last centroid while iterating and ends with size 0.

    Args:
        g_GD: the global batch's rows in canonical order, G >= K.
    """
    with torch.no_grad():
        # In double precision: between embeddings that lie close together, as when they collapse, fp32's |c|^2 - 2 g c
        # leaves nothing of the distance but rounding.
        rows_GD = g_GD.detach().double()
        centroids_KD = rows_GD[:clusters]
        assignments_G = rows_GD.new_zeros(len(rows_GD), dtype=torch.int64)
        for _ in range(iterations):
            # |g - c|^2 less |g|^2, which does not move the minimum: a matrix product and never a (G, K, D) tensor
            distance_GK = centroids_KD.square().sum(1) - 2 * rows_GD @ centroids_KD.T
            assignments_G = distance_GK.argmin(1)
            means_KD, sizes_K = _means(rows_GD, assignments_G, clusters)
            centroids_KD = torch.where(sizes_K[:, None] > 0, means_KD, centroids_KD)
    centroids, sizes = _means(g_GD, assignments_G, clusters)
    return Clusters(assignments_G, centroids, sizes)


def cluster_logits(g_GD: Tensor, clusters: Clusters, temperature: float) -> Tensor:
    """g C^T / T_c, shape (G, K); an empty cluster is masked out."""
    logits_GK = g_GD @ clusters.centroids.T / temperature
    return logits_GK.masked_fill(clusters.sizes == 0, float("-inf"))


def cluster_loss(g1_GD: Tensor, g2_GD: Tensor, clusters1: Clusters, clusters2: Clusters, temperature: float) -> Tensor:
    """L = 1/2 [CE(g1 C2^T / T_c, a2) + CE(g2 C1^T / T_c, a1)], means over the rows.

    Args:
        g1_GD, g2_GD: unit vectors of the global batch.
        clusters1, clusters2: k-means of each.
    """
    forth = F.cross_entropy(cluster_logits(g1_GD, clusters2, temperature), clusters2.assignments)
    back = F.cross_entropy(cluster_logits(g2_GD, clusters1, temperature), clusters1.assignments)
    return (forth + back) / 2


def mutual_information(
    g1_GD: Tensor, g2_GD: Tensor, clusters1: Clusters, clusters2: Clusters, temperature: float
) -> Tensor:
    """I(A1; A2) in nats of the two views' soft assignments over the global batch, to be maximised.

    Both views' rows are assigned softly to the same centroids in turn (C1 and C2), p = softmax(g C^T / T_c);
    P = 1/G sum_i p1_i p2_i^T, symmetrised, I = sum_jk P_jk log(P_jk / (P_j. P_.k)) (IIC, arXiv 1807.06653); the mean
    of the two.

    Args:
        g1_GD: group embeddings of the strong views.
        g2_GD: of the weak views.
        clusters1: of the strong views.
        clusters2: of the weak views.
        temperature: T_c.
    """
    total = g1_GD.new_zeros(())
    for clusters in (clusters1, clusters2):
        p1_GK = cluster_logits(g1_GD, clusters, temperature).softmax(1)
        p2_GK = cluster_logits(g2_GD, clusters, temperature).softmax(1)
        joint_KK = p1_GK.T @ p2_GK / len(g1_GD)
        joint_KK = ((joint_KK + joint_KK.T) / 2).clamp(min=torch.finfo(joint_KK.dtype).tiny)
        # The logarithms are added, not the marginals multiplied: an empty cluster's product would underflow to 0.
        independent_KK = joint_KK.sum(1, keepdim=True).log() + joint_KK.sum(0, keepdim=True).log()
        total = total + (joint_KK * (joint_KK.log() - independent_KK)).sum()
    return total / 2
