"""Two-view methods: a contrastive loss over the global batch, with exact accumulation.

Exact accumulation is the gradient of a global batch that does not fit, one micro-batch at a time. The loss sees a tile
only through its embeddings. So these are computed without graph for all micro-batches, the loss and its gradient with
respect to them once over the global batch, and each micro-batch is run again to carry that gradient on to the
parameters (GradCache, arXiv 2101.06983): four forward passes of a view for the direct step's two. Views are pure
functions of the tile, so the second pass sees the same images. Running statistics are recorded in one pass of each view
only. BatchNorm's statistics must not span several micro-batches: under norm sync the result would be another network's
gradient, and ``pretrain.shares`` refuses it.

Shapes: B local rows of the whole batch, b of a micro-batch, D embedding.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ca2cl.methods.accumulation import AccumulatedMethod
from ca2cl.methods.base import Engine, ViewBatch
from ca2cl.methods.gather import Rows
from ca2cl.methods.surrogate import given_gradient

FIRST, SECOND = 0, 1
"""Whose running statistics a pass adds to: those of the strong view come before the weak one's."""
Embedded = Any
"""What a network gives of one view: a named tuple of unit vectors (b, D), one a head."""
Pair = tuple[Tensor, Tensor]
"""A tensor and its gradient."""
Outer = list[tuple[Tensor, ...]]
"""For each micro-batch the gradient with respect to its embeddings, a tensor a head."""


class TwoViewMethod(AccumulatedMethod):
    """A loss of two views' embeddings, whose network is called as ``network(x, stem_delta, slot)``. If it has drop
    path, the rows' words are a fourth argument (``models.heads.EncoderNetwork``).

    Args:
        accumulation: as of ``AccumulatedMethod``.
    """

    uses_slides = False
    """Whether ``terms`` gets the rows' slides: they are gathered with the rows' places."""

    @abstractmethod
    def terms(self, first: Embedded, second: Embedded, rows: Rows) -> dict[str, Tensor]:
        """This rank's share of every term, the last one ``loss``: the sum over ranks is the term, and the gradient with
        respect to the local rows is the whole term's (``nt_xent``)."""

    def micro_step(self, engine: Engine, views: ViewBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """As ``AccumulatedMethod.micro_step``."""
        # Through the wrapper goes the last pass before the backward and no other: a wrapper takes every pass through it
        # for the start of a backward of its own (DistributedDataParallel's reducer, DeepSpeed's hooks on outputs).
        rows = Rows.at(views.positions, views.slides if self.uses_slides else None)
        first = embed_first(engine.bare, views, None, record=True)
        second = embed_second(engine.network, views, None, record=True)
        terms = self.terms(first, second, rows)
        return terms["loss"], terms

    def exact_step(self, engine: Engine, micro_batches: Sequence[ViewBatch]) -> dict[str, Tensor]:
        """As ``AccumulatedMethod.exact_step``."""
        first, second, rows, sizes = embed_all(engine, micro_batches, slides=self.uses_slides)
        terms = self.terms(first, second, rows)
        strong, weak = outer_gradients(terms["loss"], first, second, sizes, engine)
        for number, views in enumerate(micro_batches):
            passes = [Pass(embed_first, views, strong[number]), Pass(embed_second, views, weak[number])]
            carry_back(engine, passes, last=number == len(micro_batches) - 1)
        return terms


def embed_first(network: nn.Module, views: ViewBatch, delta: Tensor | None, *, record: bool) -> Embedded:
    """The strong view's embeddings, through the stem's weight plus ``delta``.

    Args:
        record: whether BatchNorm's running statistics take note. Only one clean pass of a view and step may: an
            adversarial one sees weights that no evaluation will.
    """
    words = () if views.words is None else (views.words[FIRST],)
    return network(views.x1, delta, FIRST if record else None, *words)


def embed_second(network: nn.Module, views: ViewBatch, delta: Tensor | None, *, record: bool) -> Embedded:
    """The weak view's embeddings, in the order of the strong view's rows.

    Args:
        network: called with images.
        views: both of a micro-batch.
        delta: perturbation of the stem's weight.
        record: whether the pass updates BatchNorm's running statistics.
    """
    order, slot = views.second_order, SECOND if record else None
    words = () if views.words is None else (views.words[SECOND],)
    if order is None:
        return network(views.x2, delta, slot, *words)
    found = network(views.x2[order], delta, slot, *(word[order] for word in words))
    back = torch.argsort(order)
    return found._make(part[back] for part in found)


def embed_all(
    engine: Engine, micro_batches: Sequence[ViewBatch], *, slides: bool = False
) -> tuple[Embedded, Embedded, Rows, list[int]]:
    """Both views' embeddings of all local rows as leaves of a new graph, their places, the micro-batches' sizes.

    Args:
        engine: whose network embeds them.
        micro_batches: all of this rank.
        slides: whether the rows' slides are wanted.
    """
    firsts, seconds, positions, names = [], [], [], []
    with torch.no_grad():
        for views in micro_batches:
            firsts.append(embed_first(engine.bare, views, None, record=False))
            seconds.append(embed_second(engine.bare, views, None, record=False))
            positions.append(views.positions)
            if slides and views.slides is not None:
                names.append(views.slides)
    first, second = (parts[0]._make(leaf(part) for part in zip(*parts, strict=True)) for parts in (firsts, seconds))
    rows = Rows.at(torch.cat(positions), torch.cat(names) if names else None)
    return first, second, rows, [len(part) for part in positions]


def leaf(parts: Sequence[Tensor]) -> Tensor:
    """The parts' rows as one leaf of a new graph."""
    return torch.cat(list(parts)).requires_grad_()


def outer_gradients(
    loss: Tensor, first: Embedded, second: Embedded, sizes: list[int], engine: Engine
) -> tuple[Outer, Outer]:
    """The gradient of ``loss``, times the loss scale, with respect to each view's embeddings: for each micro-batch one
    tensor a head.

    Args:
        loss: of the global batch.
        first: embeddings of the strong views.
        second: of the weak views.
        sizes: rows of each micro-batch.
        engine: knows the loss scale.
    """
    found = gradients(loss * engine.loss_scale, [*first, *second])
    halves = found[: len(first)], found[len(first) :]
    strong, weak = (list(zip(*(torch.split(part, sizes) for part in half), strict=True)) for half in halves)
    return strong, weak


def gradients(loss: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where the loss does not reach: every parameter then gets a gradient, as DistributedDataParallel wants."""
    found = torch.autograd.grad(loss, list(leaves), allow_unused=True)
    return [torch.zeros_like(one) if grad is None else grad for one, grad in zip(leaves, found, strict=True)]


def parameters_of(engine: Engine) -> list[Tensor]:
    """The trainable parameters, in the network's order."""
    return [p for p in engine.bare.parameters() if p.requires_grad]


class Pass(NamedTuple):
    """A pass of one view that is to be run with a graph.

    Attributes:
        embed: ``embed_first`` or ``embed_second``.
        views: of the micro-batch.
        outer: for each head the gradient with respect to its embeddings, times the loss scale; None: there is none.
        delta: as of ``embed``.
        record: as of ``embed``.
    """

    embed: Callable[..., Embedded]
    views: ViewBatch
    outer: Sequence[Tensor | None]
    delta: Tensor | None = None
    record: bool = True

    def run(self, network: nn.Module) -> list[Pair]:
        """Embeddings, each with its gradient."""
        found = self.embed(network, self.views, self.delta, record=self.record)
        return [(one, grad) for one, grad in zip(found, self.outer, strict=True) if grad is not None]


def carry_back(engine: Engine, passes: Sequence[Pass], *, last: bool, known: Sequence[Pair] = ()) -> None:
    """Accumulate the gradient of one micro-batch: by one backward, or where the engine is sharded by one for each pass.

    Args:
        engine: accumulates it.
        passes: those that it goes back through.
        last: whether it is the step's last micro-batch.
        known: other tensors, each with its gradient times the loss scale.
    """
    with engine.micro_step(last=last):
        if engine.sharded:
            for one in passes:
                engine.backward(carry(one.run(engine.network), engine.loss_scale))
            return
        *others, final = passes
        pairs = [pair for one in others for pair in one.run(engine.bare)]
        engine.backward(carry([*pairs, *final.run(engine.network), *known], engine.loss_scale))


def carry(pairs: Sequence[tuple[Tensor, Tensor]], scale: float | Tensor) -> Tensor:
    """A scalar whose gradient with respect to each tensor is the given one over ``scale``."""
    return given_gradient(pairs[0][0].new_zeros(()), [(tensor, gradient / scale) for tensor, gradient in pairs])
