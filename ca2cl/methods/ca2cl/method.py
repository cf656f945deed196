"""CA2CL: how a step's gradient is computed on any engine (docs/mathematics.md).

Shapes: B local rows of a micro-batch, G rows of it over all ranks, D embedding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig
from ca2cl.methods.base import Engine, MethodSettings, ViewBatch
from ca2cl.methods.ca2cl.adversary import perturbation, stem_weight, zero_perturbation
from ca2cl.methods.ca2cl.cluster_loss import k_means
from ca2cl.methods.ca2cl.grad_cache import adversarial_exact_step
from ca2cl.methods.ca2cl.losses import adversarial_term, both_terms, first_terms
from ca2cl.methods.gather import Rows, all_sum
from ca2cl.methods.nt_xent import chance_loss
from ca2cl.methods.same_slide import COUNTERS, PANEL
from ca2cl.methods.two_views import TwoViewMethod, carry, embed_first, embed_second, parameters_of
from ca2cl.models.backbone import Backbone
from ca2cl.models.heads import Embeddings, Network

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CA2CL(TwoViewMethod):
    """L1 + L2 of CA2CL, by one backward pass a micro-batch.

    L1 = NTXent(z1, z2) + lambda Cluster(g1, g2);  L2 = NTXent(z2, z_adv), z_adv the strong view through W + delta.

    The direction of delta needs L1's gradient before L2 is known. z1 does not enter L2, so one backward through the
    strong view's graph gives both the direction and L1's gradient of every parameter, and the graph is freed before the
    adversarial pass. The weak view's graph is traversed twice, the first time for the direction alone. Gradients known
    by then enter the final backward as linear terms (``carry``), so that the engine sees a single backward.

    Args:
        config: the loss.
        accumulation: as of ``TwoViewMethod``; exact accumulation with the adversary is ``grad_cache``'s.
        projection_dim: outputs of both heads.
    """

    counters = {"skipped_adversaries": "adversarial branches skipped"}
    curves = (
        ("Loss", "", (("loss", ""),)),
        ("NT-Xent", "", (("nt_xent", ""),)),
        ("Adversarial NT-Xent", "", (("nt_xent_adversarial", ""),)),
        ("Cluster loss", "", (("cluster", ""),)),
        ("Mutual information", "", (("mutual_information", ""),)),
        PANEL,
    )

    def __init__(
        self,
        config: ObjectiveConfig,
        accumulation: Literal["exact", "plain"] = "exact",
        projection_dim: int = 128,
    ) -> None:
        super().__init__(accumulation)
        self.config, self.projection_dim = config, projection_dim
        self.uses_slides = config.same_slide_weight != 1
        if config.same_slide_weight == 0:
            self.counters = {**self.counters, **COUNTERS}
        self.carried = 2 if config.adversary else 0  # L1's by the strong view, and what the surrogate makes of it

    @classmethod
    def from_settings(cls, settings: MethodSettings) -> CA2CL:
        """As ``Method.from_settings``."""
        return cls(settings.objective, settings.accumulation, settings.projection_dim)

    @classmethod
    def chance(cls, objective: ObjectiveConfig, tiles: int) -> dict[str, float]:
        """As ``Method.chance``: of both NT-Xents. The cluster loss depends on how many clusters have members."""
        level = chance_loss(tiles, objective.same_slide_weight)
        return {} if level is None else dict.fromkeys(("nt_xent", "nt_xent_adversarial"), level)

    def build(self, encoder: Backbone) -> Network:
        """As ``Method.build``."""
        return Network(encoder, self.projection_dim)

    @property
    def least_tiles(self) -> int:
        """k-means needs one for each cluster."""
        return self.config.least_tiles

    def too_few(self, tiles: int) -> tuple[str, str]:
        """As ``Method.too_few``."""
        return (
            f"k-means needs at least objective.clusters = {self.least_tiles} tiles",
            f"--objective.clusters {tiles}",
        )

    def figures(self, network: Any, tiles_NHWC: Tensor, batches: Iterable[Tensor]) -> dict[str, Figure]:
        """``clusters``: a row of tiles for each cluster of the group head's embeddings."""
        from ca2cl.methods.ca2cl.cluster_figure import cluster_figure

        groups_ND = torch.cat([network(x).g.float().cpu() for x in batches])
        clusters = min(self.config.clusters, len(groups_ND))
        found = k_means(groups_ND, clusters, self.config.lloyd_iterations)
        return {"clusters": cluster_figure(tiles_NHWC.numpy(), found.assignments.numpy(), clusters)}

    def terms(self, first: Embeddings, second: Embeddings, rows: Rows) -> dict[str, Tensor]:
        """As ``TwoViewMethod.terms``: L1 and its terms."""
        return first_terms(first, second, rows, self.config)

    def micro_step(self, engine: Engine, views: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``TwoViewMethod.micro_step``."""
        if not self.config.adversary:
            return super().micro_step(engine, views)
        weight, rows = stem_weight(engine), Rows.at(views.positions, views.slides if self.uses_slides else None)
        delta = zero_perturbation(weight)
        first = embed_first(engine.bare, views, delta, record=True)
        second = embed_second(engine.bare, views, delta, record=True)
        terms = first_terms(first, second, rows, self.config)
        gradient, carried = _first_half(terms["loss"], first, second, delta, engine)
        step, valid = perturbation(all_sum(gradient), weight, self.config.epsilon, self.config.epsilon_mode)
        perturbed = embed_first(engine.network, views, step, record=False)
        adversarial = adversarial_term(second.z, perturbed.z, rows, valid, self.config)
        return carried + adversarial, both_terms(terms, adversarial, valid)

    def exact_step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        """As ``TwoViewMethod.exact_step``."""
        if not self.config.adversary:
            return super().exact_step(engine, micro_batches)
        return adversarial_exact_step(self.config, engine, micro_batches)


def _first_half(
    loss: Tensor, first: Embeddings, second: Embeddings, delta: Tensor, engine: Engine
) -> tuple[Tensor, Tensor]:
    """L1's gradient with respect to delta on this rank, times the loss scale, and L1 as terms linear in what the last
    backward will reach: the weak view's embeddings, and the parameters, for the strong view's part.

    The strong view's graph is freed. Everything is summed over ranks inside the loss's own backward, once.
    """
    parameters, scale = parameters_of(engine), engine.loss_scale
    outer = torch.autograd.grad(loss * scale, [*first, *second], allow_unused=True)
    strong = [(e, grad) for e, grad in zip(first, outer[: len(first)], strict=True) if grad is not None]
    weak = [(e, grad) for e, grad in zip(second, outer[len(first) :], strict=True) if grad is not None]
    found = torch.autograd.grad(
        [e for e, _ in strong], [delta, *parameters], [grad for _, grad in strong], allow_unused=True
    )
    (other,) = torch.autograd.grad([e for e, _ in weak], delta, [grad for _, grad in weak], retain_graph=True)
    known = [(p, grad) for p, grad in zip(parameters, found[1:], strict=True) if grad is not None]
    assert found[0] is not None
    return found[0] + other, carry([*weak, *known], scale)
