"""Heads on the encoder's features, and networks that join them.

Shapes: B local batch, D embedding, d features.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ca2cl.models.backbone import Backbone
from ca2cl.models.batch_norm import recording
from ca2cl.models.blocks.drop_path import dropping


class Projector(nn.Module):
    """z = norm(Linear(d, d) -> ReLU -> Linear(d, D)), the instance embedding of SimCLR (arXiv 2002.05709)."""

    def __init__(self, features: int, dim: int = 128) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, features)
        self.out = nn.Linear(features, dim)

    def forward(self, h_Bd: Tensor) -> Tensor:
        """Unit vectors z (B, D), fp32."""
        return F.normalize(self.out(F.relu(self.hidden(h_Bd))).float(), dim=1)


class GroupHead(nn.Module):
    """g = norm(norm(h) V) with V's columns of unit norm: the embedding in which k-means groups the batch."""

    def __init__(self, features: int, dim: int = 128) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, dim) / features**0.5)

    def forward(self, h_Bd: Tensor) -> Tensor:
        """Unit vectors g (B, D), fp32."""
        directions = F.normalize(self.weight, dim=0)
        return F.normalize((F.normalize(h_Bd.float(), dim=1) @ directions).float(), dim=1)


class Embeddings(NamedTuple):
    """What one pass gives: z (B, D) for NT-Xent and g (B, D) for the clusters, both unit vectors in fp32."""

    z: Tensor
    g: Tensor


class EncoderNetwork(nn.Module):
    """An encoder with heads on its features: what the engine wraps and the optimizer sees.

    Attributes:
        autocast_dtype: the precision that passes are autocast to, torch.float16 or torch.bfloat16; None: to none.
    """

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        self.encoder = encoder

    def heads(self, h_Bd: Tensor) -> Any:
        """What the heads make of features: a named tuple, one tensor (B, D) a head."""
        raise NotImplementedError

    def forward(
        self,
        x_BCHW: Tensor,
        stem_delta: Tensor | None = None,
        slot: int | None = None,
        words_B: Tensor | None = None,
    ) -> Any:
        """Embeddings of one view, its own forward pass with its own BatchNorm statistics.

        Args:
            stem_delta: added to the stem's weight, see ``Backbone``.
            slot: the view that running statistics are recorded for (``norm.commit_statistics`` then moves them); None
                records none.
            words_B: int64, what drop path draws from; None for an encoder that has none.
        """
        half = self.autocast_dtype
        with (
            recording(self, slot),
            dropping(self, words_B),
            # A weight is used once in a pass: the cache would only keep a half-precision copy of each until its end.
            torch.autocast(x_BCHW.device.type, half, enabled=half is not None, cache_enabled=False),
        ):
            return self.heads(self.encoder(x_BCHW, stem_delta))


class Network(EncoderNetwork):
    """CA2CL's: a projector and a group head."""

    def __init__(self, encoder: Backbone, dim: int = 128) -> None:
        super().__init__(encoder)
        self.projector = Projector(encoder.feature_dim, dim)
        self.group_head = GroupHead(encoder.feature_dim, dim)

    def heads(self, h_Bd: Tensor) -> Embeddings:
        """z and g."""
        return Embeddings(self.projector(h_Bd), self.group_head(h_Bd))
