"""Distillation: a student's features follow a frozen teacher's.

Shapes: B local rows of a micro-batch, S side of a view in pixels, E features of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor

from ca2cl.errors import InputError
from ca2cl.methods.accumulation import AccumulatedMethod
from ca2cl.methods.base import Engine, MethodSettings, Teacher, TeacherSource, Tiles, Views
from ca2cl.methods.distill.losses import feature_term, relational_term
from ca2cl.methods.distill.network import DistillNetwork, Student
from ca2cl.methods.gather import Rows
from ca2cl.methods.two_views import FIRST, SECOND, carry, gradients, leaf
from ca2cl.models.backbone import Backbone

Projector = Literal["linear", "mlp"]
FeatureLoss = Literal["cosine", "l2"]
View = Literal["weak", "strong"]


@dataclass(frozen=True)
class DistillOptions:
    """Settings of a distillation, for ``method.options``."""

    teacher: str = ""
    """The frozen encoder: any form that model.weights takes."""
    teacher_arch: str = ""
    """Its architecture, where its weights come without a card."""
    teacher_size: int = 0
    """Side in pixels to which its input is resized; 0: the size of its card."""
    cache: str = ""
    """Folder for the teacher's features of the unaugmented tiles, computed once; empty: the teacher sees the student's
    view."""
    view: str = "weak"
    """View of the tile that is distilled: weak or strong."""
    projector: str = "linear"
    """From the student's features to the teacher's: linear or mlp (two layers)."""
    feature_loss: str = "cosine"
    """cosine: 1 - cosine of projected and teacher's features; l2: squared distance to the teacher's unit vector."""
    feature_weight: float = 1.0
    """Weight of the feature loss."""
    relational_weight: float = 1.0
    """Weight of the relational loss; 0 omits it."""
    temperature: float = 0.05
    """Temperature of the relational loss's similarities."""

    def __post_init__(self) -> None:
        for name, kind in (("view", View), ("projector", Projector), ("feature_loss", FeatureLoss)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(
                    f"method.options has {name} = {getattr(self, name)!r}: use {' or '.join(get_args(kind))}"
                )
        for name, holds, remedy in (
            ("temperature", self.temperature > 0, "use more than 0"),
            ("feature_weight", self.feature_weight >= 0, "use 0 or more"),
            ("relational_weight", self.relational_weight >= 0, "use 0 or more"),
            ("relational_weight", self.relational_weight + self.feature_weight > 0, "one of the weights must not be 0"),
            ("teacher_size", self.teacher_size == 0 or self.teacher_size >= 32, "use 32 or more, or 0"),
        ):
            if not holds:
                raise InputError(f"method.options has {name} = {getattr(self, name)}: {remedy}")


class DistillBatch(NamedTuple):
    """A view of a micro-batch (B, 3, S, S), the rows' places in the global batch, the teacher's features (B, E) where
    they are known already, and the rows' words (B,) where the student has drop path."""

    x: Tensor
    positions: Tensor
    targets: Tensor | None
    words: Tensor | None = None

    def embed(self, network: Any, slot: int | None) -> Student:
        """The student's outputs; ``slot`` is that of ``EncoderNetwork``."""
        found: Student = network(self.x, None, slot, *(() if self.words is None else (self.words,)))
        return found


class Distill(AccumulatedMethod):
    """A feature loss through a projector, and a relational loss of the features themselves (``distill.losses``).

    The teacher sees the same view as the student (arXiv 2106.05237), or the unaugmented tile where its features are
    cached. It is no part of the network: no optimizer, engine or checkpoint holds it.

    Args:
        options: its settings.
        accumulation: as of ``AccumulatedMethod``.
    """

    options = DistillOptions
    curves = (
        ("Loss", "", (("loss", ""),)),
        ("Feature loss", "", (("feature", ""),)),
        ("Relational loss", "", (("relational", ""),)),
    )
    paths = ("teacher", "cache")
    graphs = 1

    def __init__(self, options: DistillOptions, accumulation: Literal["exact", "plain"] = "exact") -> None:
        super().__init__(accumulation)
        self.settings = options
        self.teacher_source = TeacherSource(options.teacher, options.teacher_arch, options.teacher_size, options.cache)
        self._teacher: Teacher | None = None

    @classmethod
    def from_settings(cls, settings: MethodSettings) -> Distill:
        """As ``Method.from_settings``."""
        if settings.objective.same_slide_weight != 1:
            raise InputError(
                f"objective.same_slide_weight is {settings.objective.same_slide_weight:g}: method.name distill has no "
                "negatives; leave it out"
            )
        options = settings.options if isinstance(settings.options, DistillOptions) else DistillOptions()
        return cls(options, settings.accumulation)

    def take_teacher(self, teacher: Teacher) -> None:
        """As ``Method.take_teacher``."""
        self._teacher = teacher

    @property
    def teacher(self) -> Teacher:
        """The encoder that was handed over."""
        assert self._teacher is not None, "take_teacher comes first"
        return self._teacher

    def build(self, encoder: Backbone) -> DistillNetwork:
        """As ``Method.build``."""
        projector, unit = cast(Projector, self.settings.projector), self.settings.feature_loss == "cosine"
        return DistillNetwork(encoder, self.teacher.feature_dim, projector, unit=unit)

    def views(self, tiles: Tiles, views: Views) -> DistillBatch:
        """One view; a cached teacher's features beside it."""
        weak = self.settings.view == "weak"
        make = views.weak if weak else views.strong
        words = None if tiles.words is None else tiles.words[SECOND if weak else FIRST]
        x = make(tiles.pixels, tiles.keys, tiles.epoch).contiguous(memory_format=torch.channels_last)
        return DistillBatch(x, tiles.positions, self.teacher.known(tiles), words)

    def terms(self, found: Student, targets_BE: Tensor, rows: Rows) -> dict[str, Tensor]:
        """This rank's share of every term, the last one ``loss``.

        Args:
            found: the student's outputs for the local rows.
            targets_BE: the teacher's features of these.
            rows: of all ranks.
        """
        settings = self.settings
        terms = {"feature": feature_term(found.p, targets_BE, rows, cast(FeatureLoss, settings.feature_loss))}
        loss = settings.feature_weight * terms["feature"]
        if settings.relational_weight:
            terms["relational"] = relational_term(found.h, targets_BE, rows, settings.temperature)
            loss = loss + settings.relational_weight * terms["relational"]
        return {**terms, "loss": loss}

    def micro_step(self, engine: Engine, views: DistillBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``AccumulatedMethod.micro_step``."""
        targets = self._targets(views)
        terms = self.terms(views.embed(engine.network, FIRST), targets, Rows.at(views.positions))
        return terms["loss"], terms

    def exact_step(self, engine: Engine, micro_batches: Sequence[DistillBatch]) -> dict[str, Tensor]:
        """As ``AccumulatedMethod.exact_step``: GradCache (arXiv 2101.06983), as in ``two_views``."""
        embedded, targets, positions = [], [], []
        for views in micro_batches:
            with torch.no_grad():
                embedded.append(views.embed(engine.bare, None))
            targets.append(self._targets(views))
            positions.append(views.positions)
        found = Student._make(leaf(parts) for parts in zip(*embedded, strict=True))
        terms = self.terms(found, torch.cat(targets), Rows.at(torch.cat(positions)))
        sizes = [len(part) for part in positions]
        outer = [torch.split(part, sizes) for part in gradients(terms["loss"] * engine.loss_scale, found)]
        for number, views in enumerate(micro_batches):
            with engine.micro_step(last=number == len(micro_batches) - 1):
                again = views.embed(engine.network, FIRST)
                pairs = [(part, gradient[number]) for part, gradient in zip(again, outer, strict=True)]
                engine.backward(carry(pairs, engine.loss_scale))
        return terms

    def _targets(self, views: DistillBatch) -> Tensor:
        return self.teacher(views.x) if views.targets is None else views.targets
