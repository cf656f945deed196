"""Distillation losses over the global batch, with explicit gradients.

Shapes: B local batch, G global batch, R rows of a block, d features of the student, E features of the teacher.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import LOGITS_AT_ONCE, rows_at_once
from ca2cl.methods.surrogate import given_gradient


def feature_term(p_BE: Tensor, t_BE: Tensor, rows: Rows, kind: Literal["cosine", "l2"]) -> Tensor:
    """This rank's share of the feature loss: the sum over ranks is the mean of a row's loss over the global batch.

    cosine: 1 - p . t, of unit vectors, which is half their squared distance; l2: |p - t|^2.

    Args:
        p_BE: the student's projected features; unit vectors for cosine.
        t_BE: the teacher's, unit vectors.
        rows: places of the local rows.
        kind: of the loss.
    """
    p, t, pairs = p_BE.detach(), t_BE.detach(), len(rows.order)
    if kind == "cosine":
        losses_B, gradient_BE = 1 - (p * t).sum(1), -t
    else:
        losses_B, gradient_BE = (p - t).square().sum(1), 2 * (p - t)
    return given_gradient(losses_B.sum(dtype=torch.float64) / pairs, [(p_BE, gradient_BE / pairs)])


class _Block(NamedTuple):
    """A block of local rows of the student and of the teacher, and the column of each row itself."""

    h_Rd: Tensor
    t_RE: Tensor
    self_R: Tensor

    def logits(self, h_Gd: Tensor, t_GE: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's (R, G), each row's own column masked out."""
        pairs = (self.h_Rd, h_Gd), (self.t_RE, t_GE)
        own, teachers = (
            ((rows / temperature) @ columns.T).scatter_(1, self.self_R[:, None], float("-inf"))
            for rows, columns in pairs
        )
        return own, teachers


def relational_term(
    h_Bd: Tensor, t_BE: Tensor, rows: Rows, temperature: float, logits_at_once: int = LOGITS_AT_ONCE
) -> Tensor:
    """This rank's share of the relational loss: the sum over ranks is the loss.

    A row's similarities to the other rows of the global batch are a distribution, in the teacher's features and in the
    student's. The loss is the mean Kullback-Leibler divergence between the two, as in SEED (arXiv 2101.04731) and
    CompRess (arXiv 2010.14713), with the batch in place of their queue of anchors:

        P_ik = exp(h_i . h_k / T) / sum_{j != i} exp(h_i . h_j / T),   Q_ik likewise of t,
        loss = 1 / G sum_i sum_{k != i} Q_ik log(Q_ik / P_ik).

    A row is anchor once and a column of every other row, so

        d loss / d h_i = 1 / (G T) sum_{k != i} (P_ik - Q_ik + P_ki - Q_ki) h_k.

    As in ``nt_xent``, P_ki and Q_ki need the row's own logits and the columns' normalisers only: each rank has the
    whole gradient of its rows without a backward collective, and memory does not grow with G^2.

    Args:
        h_Bd: unit vectors of the student.
        t_BE: unit vectors of the teacher, without gradient.
        rows: places of the local rows.
        temperature: T.
        logits_at_once: most logits of either in memory at a time; at least one row's are.
    """
    h, t = h_Bd.detach(), t_BE.detach()
    h_Gd, t_GE = rows.gather(h, t)
    pairs, size = len(h_Gd), rows_at_once(h.device, len(h_Gd), logits_at_once)
    blocks = _blocks(h, t, rows.own, size)
    log_z_R2 = torch.cat([_normalisers(block.logits(h_Gd, t_GE, temperature)) for block in blocks])
    log_z_G2 = rows.gather(log_z_R2[: len(h)])[0]

    losses, gradients = [], []
    for block, own_R2 in zip(blocks, torch.split(log_z_R2, size), strict=True):
        found = block.logits(h_Gd, t_GE, temperature)
        log_p_RG, log_q_RG = (logits - own for logits, own in zip(found, own_R2.T[..., None], strict=True))
        q_RG = log_q_RG.exp()
        difference_RG = (log_q_RG - log_p_RG).scatter_(1, block.self_R[:, None], 0.0)
        losses.append((q_RG * difference_RG).sum(1))
        back_p_RG, back_q_RG = ((logits - other).exp() for logits, other in zip(found, log_z_G2.T, strict=True))
        gradients.append((log_p_RG.exp() - q_RG + back_p_RG - back_q_RG) @ h_Gd)
    total = torch.cat(losses)[: len(h)].sum(dtype=torch.float64)
    return given_gradient(total / pairs, [(h_Bd, torch.cat(gradients)[: len(h)] / (pairs * temperature))])


def _normalisers(logits: tuple[Tensor, Tensor]) -> Tensor:
    """The log of both sums of exponentials, (R, 2)."""
    return torch.stack([one.logsumexp(1) for one in logits], dim=1)


def _blocks(h_Bd: Tensor, t_BE: Tensor, own_B: Tensor, size: int) -> list[_Block]:
    """The local rows in blocks of ``size``; what fills up the last one is to be dropped."""
    missing = -len(h_Bd) % size
    padded = [torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) for part in (h_Bd, t_BE, own_B)]
    return [_Block(*part) for part in zip(*(torch.split(part, size) for part in padded), strict=True)]
