"""SimCLR: NT-Xent between the strong and the weak view (arXiv 2002.05709)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import MethodSettings
from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import chance_loss, nt_xent
from ca2cl.methods.same_slide import COUNTERS, PANEL, same_slide_terms
from ca2cl.methods.two_views import TwoViewMethod
from ca2cl.models.backbone import Backbone
from ca2cl.models.heads import EncoderNetwork, Projector


class Projected(NamedTuple):
    """z (B, D), unit vectors in fp32."""

    z: Tensor


class SimCLRNetwork(EncoderNetwork):
    """An encoder and a projector."""

    def __init__(self, encoder: Backbone, dim: int) -> None:
        super().__init__(encoder)
        self.projector = Projector(encoder.feature_dim, dim)

    def heads(self, h_Bd: Tensor) -> Projected:
        """z alone."""
        return Projected(self.projector(h_Bd))


class SimCLR(TwoViewMethod):
    """NT-Xent over the global batch.

    Args:
        temperature: T.
        accumulation: as of ``TwoViewMethod``.
        projection_dim: outputs of the projector.
        same_slide_weight: w of ``nt_xent``.
    """

    curves = (("Loss", "", (("loss", "NT-Xent"),)), PANEL)

    def __init__(
        self,
        temperature: float = 0.2,
        accumulation: Literal["exact", "plain"] = "exact",
        projection_dim: int = 128,
        same_slide_weight: float = 1.0,
    ) -> None:
        super().__init__(accumulation)
        self.temperature, self.projection_dim = temperature, projection_dim
        self.same_slide_weight, self.uses_slides = same_slide_weight, same_slide_weight != 1
        if same_slide_weight == 0:
            self.counters = COUNTERS

    @classmethod
    def from_settings(cls, settings: MethodSettings) -> SimCLR:
        """As ``Method.from_settings``; temperature and weight are those of ``objective``."""
        objective = settings.objective
        return cls(objective.temperature, settings.accumulation, settings.projection_dim, objective.same_slide_weight)

    @classmethod
    def chance(cls, objective: ObjectiveConfig, tiles: int) -> dict[str, float]:
        """As ``Method.chance``."""
        level = chance_loss(tiles, objective.same_slide_weight)
        return {} if level is None else {"loss": level}

    def build(self, encoder: Backbone) -> SimCLRNetwork:
        """As ``Method.build``."""
        return SimCLRNetwork(encoder, self.projection_dim)

    def terms(self, first: Projected, second: Projected, rows: Rows) -> dict[str, Tensor]:
        """As ``TwoViewMethod.terms``."""
        weight = self.same_slide_weight
        loss = nt_xent(first.z, second.z, rows, self.temperature, same_slide_weight=weight)
        return {**same_slide_terms(rows, weight), "loss": loss}
