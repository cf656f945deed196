"""Numbers that describe features: neighbours, a linear probe, rank, uniformity, centroids.

Double precision on the CPU: the same features give the same numbers on any number of processes.

Legend: N tiles, D features, C classes, K centroids, R rows of a block, M rows of a fold.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.methods.ca2cl.cluster_loss import k_means

NEIGHBOURS = 20
RIDGE = 1.0
"""L2 penalty of the linear probe, on rows of unit length."""
_EPSILON = 1e-7
_SHARPNESS = 2.0
_ROWS = 1024  # of a matrix of tiles by tiles, at a time
_FLOOR = 1e-9  # as in evaluation.probe.classifiers


def unit_rows(values_ND: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros stays as it is."""
    return F.normalize(values_ND, dim=1, eps=torch.finfo(values_ND.dtype).tiny)


def centred_rows(values_ND: Tensor) -> Tensor:
    """Rows less their mean, of length 1: what all tiles share makes every cosine close to 1."""
    return unit_rows(values_ND - values_ND.mean(0))


def effective_rank(values_ND: Tensor) -> float:
    """RankMe (Garrido et al., ICML 2023, equation 1): exp of the entropy of the singular values; 0 for all zeros.

    p_k = s_k / sum(s) + 1e-7 with the singular values s of the features as they are, neither centred nor scaled:
    between 1 (all tiles on one line through 0) and min(N, D).
    """
    rows, columns = values_ND.shape
    gram = values_ND.T @ values_ND if columns <= rows else values_ND @ values_ND.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total == 0:
        return 0.0
    p = singular / total + _EPSILON
    return float((-(p * p.log()).sum()).exp())


def uniformity(unit_ND: Tensor) -> float:
    """log mean exp(-2 |f_i - f_j|^2) over the pairs i < j of unit vectors (Wang and Isola, ICML 2020, section 4.1.2).

    0 if all are alike; the lower, the more evenly they cover the sphere.
    """
    total = torch.zeros((), dtype=unit_ND.dtype)
    for first, cosines_RN in _cosines(unit_ND):
        kernel_RN = (-_SHARPNESS * (2 - 2 * cosines_RN).clamp(min=0)).exp()
        total += kernel_RN.triu(first + 1).sum()
    pairs = len(unit_ND) * (len(unit_ND) - 1) / 2
    return float((total / pairs).log())


def spread(unit_ND: Tensor) -> float:
    """1 - |mean f|^2 of unit vectors: half the mean squared distance of two tiles; 0 if all are alike, at most 1."""
    mean_D = unit_ND.mean(0)
    # Not 1 - |mean|^2, which rounds to multiples of 1e-16; a row of zeros has no direction, and counts as the mean.
    return float((unit_ND - mean_D).square().sum(1).mean())


def squared_distances(first_BD: Tensor, second_BD: Tensor) -> Tensor:
    """Squared distance (B,) between the features of two views on the unit sphere: their mean is the alignment (Wang and
    Isola, section 4.1.1, exponent 2). 0 if the features do not depend on the view."""
    return (unit_rows(first_BD.double()) - unit_rows(second_BD.double())).square().sum(1)


def neighbour_accuracy(centred_ND: Tensor, labels_N: Tensor, unit_N: Tensor) -> float:
    """Mean over classes of the share of tiles whose class their 20 nearest tiles of other slides vote for.

    As the probe's k-NN: cosines are the weights of the votes. A tile is not its own neighbour, nor are tiles of its
    slide.

    Args:
        centred_ND: of ``centred_rows``.
        labels_N: classes from 0.
        unit_N: number of each tile's slide; of the tile itself where slides are not known.
    """
    predicted = torch.empty_like(labels_N)
    votes_for = F.one_hot(labels_N).double()
    for first, cosines_RN in _cosines(centred_ND):
        rows = slice(first, first + len(cosines_RN))
        cosines_RN[unit_N[rows, None] == unit_N] = -torch.inf
        nearest = cosines_RN.topk(min(NEIGHBOURS, len(labels_N)), dim=1)
        weights_RK = nearest.values.clamp(min=_FLOOR) * nearest.values.isfinite()
        predicted[rows] = (weights_RK[:, :, None] * votes_for[nearest.indices]).sum(1).argmax(1)
    return mean_recall(predicted, labels_N)


def linear_accuracy(centred_ND: Tensor, labels_N: Tensor, fold_N: Tensor) -> float:
    """Mean over classes of the share of tiles that ridge regression on the other folds' labels gets right.

    W = (X^T X + r)^-1 X^T (Y - mean Y) in closed form, on one-hot labels Y.

    Args:
        centred_ND: of ``centred_rows``.
        labels_N: classes from 0.
        fold_N: number of each tile's fold.
    """
    targets_NC = F.one_hot(labels_N).double()
    gram_DD, moment_DC = centred_ND.T @ centred_ND, centred_ND.T @ targets_NC
    sum_D = centred_ND.sum(0)
    penalty_DD = RIDGE * torch.eye(centred_ND.shape[1], dtype=centred_ND.dtype)
    predicted = torch.empty_like(labels_N)
    for fold in sorted(set(fold_N.tolist())):
        held_N = fold_N == fold
        x_MD, y_MC = centred_ND[held_N], targets_NC[held_N]
        prior_C = targets_NC[~held_N].mean(0)
        right_DC = moment_DC - x_MD.T @ y_MC - (sum_D - x_MD.sum(0))[:, None] * prior_C
        weight_DC = torch.linalg.solve(gram_DD - x_MD.T @ x_MD + penalty_DD, right_DC)
        predicted[held_N] = (x_MD @ weight_DC + prior_C).argmax(1)
    return mean_recall(predicted, labels_N)


def accuracies_from(
    reference_RD: Tensor, reference_labels_R: Tensor, values_ND: Tensor, labels_N: Tensor
) -> tuple[float, float]:
    """As ``neighbour_accuracy`` and ``linear_accuracy``, where other tiles vote and are fitted.

    Features are taken less the mean of the reference.

    Args:
        reference_RD: features of labelled tiles.
        reference_labels_R: their classes from 0.
        values_ND: features of the tiles that are scored.
        labels_N: their classes.
    """
    mean_D = reference_RD.mean(0)
    reference_RD, rows_ND = unit_rows(reference_RD - mean_D), unit_rows(values_ND - mean_D)
    targets_RC = F.one_hot(reference_labels_R).double()
    nearest = (rows_ND @ reference_RD.T).topk(min(NEIGHBOURS, len(reference_RD)), dim=1)
    votes_NC = (nearest.values.clamp(min=_FLOOR)[:, :, None] * targets_RC[nearest.indices]).sum(1)
    prior_C = targets_RC.mean(0)
    penalty_DD = RIDGE * torch.eye(reference_RD.shape[1], dtype=reference_RD.dtype)
    weight_DC = torch.linalg.solve(reference_RD.T @ reference_RD + penalty_DD, reference_RD.T @ (targets_RC - prior_C))
    scores_NC = rows_ND @ weight_DC + prior_C
    return mean_recall(votes_NC.argmax(1), labels_N), mean_recall(scores_NC.argmax(1), labels_N)


def mean_recall(predicted_N: Tensor, labels_N: Tensor) -> float:
    """Mean over the classes present of the share of their tiles that are predicted right."""
    right_N = (predicted_N == labels_N).double()
    return float(torch.stack([right_N[labels_N == label].mean() for label in sorted(set(labels_N.tolist()))]).mean())


def centroid_shares(unit_ND: Tensor, clusters: int, iterations: int) -> tuple[float, float]:
    """Largest and smallest share of tiles of a centroid of k-means, as the cluster loss runs it in a batch."""
    sizes_K = k_means(unit_ND, min(clusters, len(unit_ND)), iterations).sizes / len(unit_ND)
    return float(sizes_K.max()), float(sizes_K.min())


def _cosines(unit_ND: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Products (R, N) of blocks of rows with all, each with the number of its first row."""
    for first in range(0, len(unit_ND), _ROWS):
        yield first, unit_ND[first : first + _ROWS] @ unit_ND.T
