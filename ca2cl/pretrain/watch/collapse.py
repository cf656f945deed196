"""Collapse of the features: definition and reason.

A collapsed encoder maps all tiles to one vector or to one line, or to no number at all; nothing is left to learn from,
whatever the data, the encoder and the method. That may show in the features, or in the embeddings that the loss
compares: behind a head that maps everything to one vector, no gradient reaches the encoder. The signs:

- a number is not finite;
- all tiles are alike: two unit vectors differ by less than ``ALIKE`` of their length (root mean square). Uniformity is
  then above -2 ``ALIKE``^2, practically 0;
- there is one dimension: the effective rank (RankMe) of the vectors, or of the differences between tiles, is below
  ``ONE``. It is 1 for a line, and 2 for two directions of the same weight.
"""

from __future__ import annotations

import math

from torch import Tensor

from ca2cl.pretrain.watch.measures import effective_rank, spread, unit_rows

ALIKE = 0.01
ONE = 1.1


def collapse_of(features_ND: Tensor, embeddings_NE: Tensor) -> str:
    """The reason why features (N, D) or embeddings (N, E), in double precision, have collapsed; empty if they have not.

    ``embeddings_NE`` may have no columns.
    """
    return _of(features_ND, "features") or (_of(embeddings_NE, "embeddings") if embeddings_NE.shape[1] else "")


def apart(values_ND: Tensor) -> float:
    """Distance of two tiles on the unit sphere, root mean square: 0 if all are alike, at most 1.41."""
    return math.sqrt(2 * spread(unit_rows(values_ND)))


def _of(values_ND: Tensor, name: str) -> str:
    broken = int((~values_ND.isfinite()).any(1).sum())
    if broken:
        return f"the {name} of {broken} of {len(values_ND)} tiles are not finite"
    if not values_ND.any():
        return f"all {name} are 0"
    distance = apart(values_ND)
    if distance < ALIKE:
        return f"all tiles are alike: their {name} differ by {distance:.1e} of their length"
    for what, rank in (
        (name, effective_rank(values_ND)),
        (f"differences of the {name}", effective_rank(values_ND - values_ND.mean(0))),
    ):
        if rank < ONE:
            return f"the {what} have an effective rank of {rank:.2f} of {values_ND.shape[1]}"
    return ""
