"""Student network: an encoder and a projector to the teacher's features.

Shapes: B local batch, d features of the student, E features of the teacher.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ca2cl.models.backbone import Backbone
from ca2cl.models.heads import EncoderNetwork


class Student(NamedTuple):
    """Output of one pass, in fp32.

    Attributes:
        p: (B, E), the features through the projector; unit vectors for the cosine loss.
        h: (B, d), the features themselves, as unit vectors.
    """

    p: Tensor
    h: Tensor


class DistillNetwork(EncoderNetwork):
    """An encoder and a projector of its features.

    Args:
        encoder: the student.
        teacher_dim: E.
        projector: linear: one layer; mlp: Linear(d, d) -> ReLU -> Linear(d, E).
        unit: scale the projector's outputs to unit length.
    """

    def __init__(
        self, encoder: Backbone, teacher_dim: int, projector: Literal["linear", "mlp"] = "linear", *, unit: bool = True
    ) -> None:
        super().__init__(encoder)
        features = encoder.feature_dim
        hidden = [nn.Linear(features, features), nn.ReLU()] if projector == "mlp" else []
        self.projector = nn.Sequential(*hidden, nn.Linear(features, teacher_dim))
        self.unit = unit

    def heads(self, h_Bd: Tensor) -> Student:
        """Both outputs."""
        p_BE = self.projector(h_Bd).float()
        return Student(F.normalize(p_BE, dim=1) if self.unit else p_BE, F.normalize(h_Bd.float(), dim=1))
