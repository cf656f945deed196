"""NT-Xent between two views, with its gradient written out.

SimCLR, arXiv 2002.05709, equation 1.


Shapes: B local batch, G global batch, N = 2G rows of both views, R rows of a block, D embedding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ca2cl.methods.gather import Rows
from ca2cl.methods.surrogate import given_gradient

LOGITS_AT_ONCE = 1 << 22
"""Most logits in memory at a time (16 MB in fp32): memory grows with G and not with G^2."""
_ROWS_AT_ONCE = {"cpu": 64}
_ROWS_ON_GPUS = 512
"""Rows of a block. All blocks have as many, padded: a matrix product's last bits depend on its shape, which must not
depend on how many rows a rank has. A GPU wants few large kernels, a CPU those that fit into a cache."""


class _Loss(NamedTuple):
    """What decides about logits: the temperature, log w, and the columns' slides, without which w is 1."""

    temperature: float
    log_weight: float = 0.0
    slides_N: Tensor | None = None


class _Block(NamedTuple):
    """A block of local rows, with the column of each row itself and of its positive."""

    rows_RD: Tensor
    self_R: Tensor
    positive_R: Tensor

    def logits(self, columns_ND: Tensor, loss: _Loss) -> Tensor:
        """(R, N), each row's own column masked out, and log w added to those of negatives of its slide."""
        logits_RN = (self.rows_RD / loss.temperature) @ columns_ND.T
        logits_RN.scatter_(1, self.self_R[:, None], float("-inf"))
        if loss.slides_N is None:
            return logits_RN
        same_RN = loss.slides_N[self.self_R][:, None] == loss.slides_N
        same_RN.scatter_(1, self.positive_R[:, None], False)
        return torch.where(same_RN, logits_RN + loss.log_weight, logits_RN)


def chance_loss(tiles: int, same_slide_weight: float = 1.0) -> float | None:
    """NT-Xent where all similarities are equal: log(2G - 1); None if it depends on the batch's slides.

    Args:
        tiles: G.
        same_slide_weight: w of ``nt_xent``.
    """
    return math.log(2 * tiles - 1) if same_slide_weight == 1 else None


def nt_xent(
    z1_BD: Tensor,
    z2_BD: Tensor,
    rows: Rows,
    temperature: float,
    logits_at_once: int = LOGITS_AT_ONCE,
    *,
    same_slide_weight: float = 1.0,
) -> Tensor:
    """This rank's share of NT-Xent over the global batch: the sum over ranks is the loss.

    For row i of either view, with the other view's row i as the positive p and all 2G - 1 rows k other than i,

        l_i = -log( exp(s_ip) / Z_i ),   s_ik = z_i . z_k / T,   Z_i = sum_{k != i} exp(s_ik),   loss = sum_i l_i / 2G.

    With a weight w of negatives of the anchor's slide, s_ik = z_i . z_k / T + log w for these (k != p): 0 leaves them
    out. A row without other negatives then has the loss 0. The weight of k for i is that of i for k.

    A row is anchor once and a column of every other row, so with P_ik = exp(s_ik) / Z_i

        d loss / d z_i = [ sum_{k != i} (P_ik + P_ki) z_k - 2 z_p ] / (2G T).

    P_ki needs no logits but the row's own, only Z_k: each rank has the whole gradient of its rows after the numbers log
    Z have been gathered, and no backward collective. Both passes go through the logits in blocks of rows.

    Args:
        z1_BD, z2_BD: unit vectors of the local rows of the two views.
        rows: their places in the global batch.
        temperature: T.
        logits_at_once: most logits in memory at a time; at least one row's are.
        same_slide_weight: w, from 0 to 1; other than 1 it wants ``rows.slides``.

    Returns:
        A scalar: the mean of l_i over the local 2B rows, times B / G. Its gradient is that of the whole loss.
    """
    loss = _Loss(temperature)
    if rows.slides is not None and same_slide_weight != 1:
        log_weight = math.log(same_slide_weight) if same_slide_weight else -math.inf
        loss = _Loss(temperature, log_weight, rows.slides.repeat(2))
    total, (grad1_BD, grad2_BD) = _value_and_gradients(z1_BD.detach(), z2_BD.detach(), rows, loss, logits_at_once)
    return given_gradient(total, [(z1_BD, grad1_BD), (z2_BD, grad2_BD)])


def _value_and_gradients(
    z1_BD: Tensor, z2_BD: Tensor, rows: Rows, loss: _Loss, logits_at_once: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    columns_ND = torch.cat(rows.gather(z1_BD, z2_BD))
    pairs = len(columns_ND) // 2
    local = 2 * len(z1_BD)
    size = rows_at_once(z1_BD.device, len(columns_ND), logits_at_once)
    blocks = _blocks(torch.cat([z1_BD, z2_BD]), rows.own, pairs, size)
    log_z = torch.cat([block.logits(columns_ND, loss).logsumexp(1) for block in blocks])
    log_z_N = torch.cat(rows.gather(*log_z[:local, None].chunk(2))).squeeze(1)

    losses, gradients = [], []
    for block, own_log_z_R in zip(blocks, torch.split(log_z, size), strict=True):
        logits_RN = block.logits(columns_ND, loss)
        losses.append(own_log_z_R - logits_RN.gather(1, block.positive_R[:, None]).squeeze(1))
        both_RN = (logits_RN - own_log_z_R[:, None]).exp_().add_(logits_RN.sub_(log_z_N).exp_())
        gradients.append(both_RN @ columns_ND - 2 * columns_ND[block.positive_R])
    total = torch.cat(losses)[:local].sum(dtype=torch.float64)
    return total / (2 * pairs), (torch.cat(gradients)[:local] / (2 * pairs * loss.temperature)).chunk(2)


def rows_at_once(device: torch.device, columns: int, logits_at_once: int = LOGITS_AT_ONCE) -> int:
    """Rows of a block of logits over ``columns`` columns."""
    return max(1, min(_ROWS_AT_ONCE.get(device.type, _ROWS_ON_GPUS), logits_at_once // columns))


def _blocks(rows_RD: Tensor, own_B: Tensor, pairs: int, size: int) -> list[_Block]:
    """The local rows of both views in blocks of ``size``; what fills up the last one is to be dropped."""
    parts = rows_RD, torch.cat([own_B, own_B + pairs]), torch.cat([own_B + pairs, own_B])
    missing = -len(rows_RD) % size
    padded = [torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in parts]
    return [_Block(*part) for part in zip(*(torch.split(part, size) for part in padded), strict=True)]
