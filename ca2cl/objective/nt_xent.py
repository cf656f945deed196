"""NT-Xent between two views (SimCLR, arXiv 2002.05709, equation 1).

Shapes: B local batch, G global batch, D embedding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z1_BD: Tensor, z2_BD: Tensor, z1_GD: Tensor, z2_GD: Tensor, own_B: Tensor, temperature: float) -> Tensor:
    """This rank's share of NT-Xent over the global batch: the sum over ranks is the loss.

    For row i of either view, with the other view's row i as the positive p and all 2G - 1 rows k other than i,

        l_i = -log( exp(z_i . z_p / T) / sum_{k != i} exp(z_i . z_k / T) ),   loss = sum_i l_i / 2G.

    Args:
        z1_BD, z2_BD: unit vectors of the local rows of the two views.
        z1_GD, z2_GD: those of the global batch, in canonical order.
        own_B: places of the local rows in the global batch, int64.
        temperature: T.

    Returns:
        A scalar: the mean of l_i over the local 2B rows, times B / G.
    """
    columns_ND = torch.cat([z1_GD, z2_GD])
    rows = len(z1_GD)
    total = z1_BD.new_zeros(())
    for view_BD, self_B, positive_B in ((z1_BD, own_B, own_B + rows), (z2_BD, own_B + rows, own_B)):
        logits_BN = view_BD @ columns_ND.T / temperature
        logits_BN = logits_BN.scatter(1, self_B[:, None], float("-inf"))
        total = total + F.cross_entropy(logits_BN, positive_B, reduction="sum")
    return total / (2 * rows)
