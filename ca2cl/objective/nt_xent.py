"""NT-Xent between two views (SimCLR, arXiv 2002.05709, equation 1).

Shapes: B local batch, G global batch, N = 2G rows of both views, D embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 24
"""Logits that are held at a time (64 MB in fp32): memory grows with G and not with G^2."""


def nt_xent(
    z1_BD: Tensor,
    z2_BD: Tensor,
    z1_GD: Tensor,
    z2_GD: Tensor,
    own_B: Tensor,
    temperature: float,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Tensor:
    """This rank's share of NT-Xent over the global batch: the sum over ranks is the loss.

    For row i of either view, with the other view's row i as the positive p and all 2G - 1 rows k other than i,

        l_i = -log( exp(z_i . z_p / T) / sum_{k != i} exp(z_i . z_k / T) ),   loss = sum_i l_i / 2G.

    Computed in blocks of rows, each worked out again in the backward pass.

    Args:
        z1_BD, z2_BD: unit vectors of the local rows of the two views.
        z1_GD, z2_GD: those of the global batch, in canonical order.
        own_B: places of the local rows in the global batch, int64.
        temperature: T.
        logits_at_once: most logits to hold at a time; one row's are held in any case.

    Returns:
        A scalar: the mean of l_i over the local 2B rows, times B / G.
    """
    columns_ND = torch.cat([z1_GD, z2_GD])
    pairs = len(z1_GD)
    block = max(1, logits_at_once // len(columns_ND))
    total = z1_BD.new_zeros(())
    for view_BD, self_B, positive_B in ((z1_BD, own_B, own_B + pairs), (z2_BD, own_B + pairs, own_B)):
        parts = zip(
            torch.split(view_BD, block), torch.split(self_B, block), torch.split(positive_B, block), strict=True
        )
        for rows in parts:
            if len(view_BD) <= block:
                total = total + _summed(*rows, columns_ND, temperature)
            else:
                total = total + checkpoint(_summed, *rows, columns_ND, temperature, use_reentrant=False)
    return total / (2 * pairs)


def _summed(view_RD: Tensor, self_R: Tensor, positive_R: Tensor, columns_ND: Tensor, temperature: float) -> Tensor:
    """The sum of l_i over R rows."""
    logits_RN = view_RD @ columns_ND.T / temperature
    logits_RN = logits_RN.scatter(1, self_R[:, None], float("-inf"))
    return F.cross_entropy(logits_RN, positive_R, reduction="sum")
