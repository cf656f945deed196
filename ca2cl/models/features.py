"""Features of a body: by position, pooled, and as maps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ca2cl.config import Pooling


class Tokens(NamedTuple):
    """Features by position, before pooling.

    Attributes:
        prefix: class and register tokens (B, P, D) of a ViT; P is 0 for other bodies.
        patches: features of the patches (B, h, w, D), or the last map of a convolutional body.
    """

    prefix: Tensor
    patches: Tensor


class Encoded(NamedTuple):
    """Features of one pass.

    Attributes:
        pooled: features (B, D) by pooling; ``default`` is the encoder's own, what ``forward`` gives.
        tokens: features by position.
    """

    pooled: dict[Pooling, Tensor]
    tokens: Tokens


class Level(NamedTuple):
    """One of a body's feature maps.

    Attributes:
        channels: of the map.
        stride: pixels of the image, on both axes, for one position of the map.
    """

    channels: int
    stride: int


def pool(tokens: Tokens, pooling: Pooling) -> Tensor:
    """Features (B, D), or (B, 2 D) for ``both``, of features by position."""
    parts = {"class": tokens.prefix[:, :1], "mean": tokens.patches.flatten(1, 2)}
    return torch.cat([one.mean(1) for name, one in parts.items() if pooling in (name, "both")], 1)
