"""``nt_xent`` and ``cluster_loss`` for trainers of your own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.ca2cl.losses import cluster_terms
from ca2cl.methods.gather import Rows, world
from ca2cl.methods.nt_xent import nt_xent as share_of_nt_xent


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, temperature: float = 0.2) -> Tensor:
    """NT-Xent loss between two views of a batch (SimCLR, arXiv 2002.05709, equation 1).

    Negatives are all rows of both views on all ranks of ``torch.distributed``'s default group, where there is one. The
    mean over ranks is the loss of the global batch. Its gradient is exact under ``DistributedDataParallel``, which
    averages the ranks' gradients. Memory grows with the global batch, not with its square.

    Args:
        z1_BD: projections of the first views, floating point (B, D), B the same on all ranks; they are scaled to unit
            length.
        z2_BD: of the second views; row i is the positive of row i.
        temperature: T, positive.

    Returns:
        A scalar in float64, at least 0; log(2 G - 1) for a global batch of G pairs whose rows are all alike.

    Raises:
        ValueError: shapes that differ, fewer than two rows over all ranks, or a temperature that is not positive.

    Example:
        >>> loss = ca2cl.nt_xent(projector(encoder(strong)), projector(encoder(weak)))
    """
    _check(z1_BD, z2_BD, temperature, least=2)
    z1_BD, z2_BD = (F.normalize(z, dim=1) for z in (z1_BD, z2_BD))
    return share_of_nt_xent(z1_BD, z2_BD, _rows(z1_BD), temperature) * world()[1]


def cluster_loss(
    g1_BD: Tensor, g2_BD: Tensor, clusters: int = 10, temperature: float = 0.2, iterations: int = 10
) -> Tensor:
    """Cluster loss of CA2CL: each view is classified by the other view's k-means clusters (section III of the paper).

    The clusters are those of the global batch, as for ``nt_xent``.

    Args:
        g1_BD: embeddings of the first views, floating point (B, D), B the same on all ranks; they are scaled to unit
            length.
        g2_BD: of the second views.
        clusters: K, at most the rows of the global batch.
        temperature: of the softmax over centroids, positive.
        iterations: Lloyd iterations of k-means.

    Returns:
        A scalar in float64, at least 0; log(K) for rows that are all equally near to all centroids.

    Raises:
        ValueError: shapes that differ, fewer rows than clusters, or a temperature that is not positive.

    Example:
        >>> loss = ca2cl.nt_xent(z1, z2) + 0.1 * ca2cl.cluster_loss(g1, g2)
    """
    _check(g1_BD, g2_BD, temperature, least=clusters)
    config = ObjectiveConfig(clusters=clusters, cluster_temperature=temperature, lloyd_iterations=iterations)
    g1_BD, g2_BD = (F.normalize(g, dim=1) for g in (g1_BD, g2_BD))
    return cluster_terms(g1_BD, g2_BD, _rows(g1_BD), config)["cluster"] * world()[1]


def _check(one_BD: Tensor, other_BD: Tensor, temperature: float, least: int) -> None:
    if one_BD.ndim != 2 or one_BD.shape != other_BD.shape:
        raise ValueError(f"views are {tuple(one_BD.shape)} and {tuple(other_BD.shape)}: give two of shape (B, D)")
    if len(one_BD) * world()[1] < least:
        raise ValueError(f"{len(one_BD) * world()[1]} rows over all ranks: give at least {least}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: use a positive number")


def _rows(local_BD: Tensor) -> Rows:
    """Rows in the order of the ranks."""
    places = torch.arange(len(local_BD), device=local_BD.device)
    return Rows.at(places + world()[0] * len(local_BD))
