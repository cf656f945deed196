"""Encoder with a linear head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ca2cl.models.backbone import Backbone
from ca2cl.models.batch_norm import recording


class Classifier(nn.Module):
    """logits = Linear(encoder(x)).

    Args:
        zero_head: whether the head starts at zero, so that every class is as likely at first, or as torch starts it.

    Attributes:
        autocast_dtype: the precision that passes are autocast to, torch.float16 or torch.bfloat16; None: to none.
    """

    def __init__(self, encoder: Backbone, classes: int, *, zero_head: bool = True) -> None:
        super().__init__()
        self.autocast_dtype: torch.dtype | None = None
        self.encoder = encoder
        self.head = nn.Linear(encoder.feature_dim, classes)
        if zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K) in fp32 of normalised tiles (B, 3, H, W). While training, running statistics are recorded."""
        half = self.autocast_dtype
        slot = 0 if self.training else None
        with recording(self, slot), torch.autocast(x_BCHW.device.type, half, enabled=half is not None):
            logits_BK: Tensor = self.head(self.encoder(x_BCHW))
        return logits_BK.float()
