"""Collapse of the features, defined by what they are and not by how a run got there.

A collapsed encoder maps all tiles to one vector or to one line, or to no number at all. Each of these leaves nothing to
learn from, whatever the data, the encoder and the method:

- a feature is not finite;
- all tiles are alike: two unit vectors differ by less than ``ALIKE`` of their length (root mean square). Uniformity is
  then above -2 ``ALIKE``^2, practically 0;
- the features have one dimension: the effective rank (RankMe) of the features, or of the differences between tiles, is
  below ``ONE``. It is 1 for a line, and 2 for two directions of the same weight.
"""

from __future__ import annotations

import math

from torch import Tensor

from ca2cl.pretrain.watch.measures import effective_rank, spread, unit_rows

ALIKE = 0.01
ONE = 1.1


def collapse_of(values_ND: Tensor) -> str:
    """The reason why features (N, D), in double precision, have collapsed; empty if they have not."""
    broken = int((~values_ND.isfinite()).any(1).sum())
    if broken:
        return f"the features of {broken} of {len(values_ND)} tiles are not finite"
    if not values_ND.any():
        return "all features are 0"
    apart = math.sqrt(2 * spread(unit_rows(values_ND)))
    if apart < ALIKE:
        return f"all tiles are alike: their features differ by {apart:.1e} of their length"
    for what, rank in (
        ("features", effective_rank(values_ND)),
        ("differences between tiles", effective_rank(values_ND - values_ND.mean(0))),
    ):
        if rank < ONE:
            return f"the {what} have an effective rank of {rank:.2f} of {values_ND.shape[1]}"
    return ""
