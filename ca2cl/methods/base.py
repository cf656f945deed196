"""What the ways to compute a step share: its views, its engine, and single passes through the network.

Shapes: B local rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ca2cl.methods.surrogate import given_gradient
from ca2cl.models.heads import Embeddings, Network

FIRST, SECOND = 0, 1
"""Whose running statistics a pass adds to: those of the strong view come before the weak one's."""


class ViewBatch(NamedTuple):
    """Two views of a micro-batch, (B, 3, S, S) each, and its rows' places in the global batch, (B,) int64.

    ``second_order`` (B,), where it is given, is the order in which the weak view's rows go through the network:
    groups of ``lane_group`` normalisation are runs of consecutive rows, and each view has its own.
    """

    x1: Tensor
    x2: Tensor
    positions: Tensor
    second_order: Tensor | None = None


class Engine(Protocol):
    """What a method needs of whatever carries its gradient."""

    @property
    def network(self) -> torch.nn.Module:
        """The wrapped network: call it like ``Network``."""

    @property
    def bare(self) -> Network:
        """The network inside the wrapper: for passes that the engine must not notice."""

    @property
    def loss_scale(self) -> float:
        """The factor by which fp16 training multiplies a loss before its backward; 1 otherwise."""

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Surrounds a micro-batch's passes; gradients are exchanged in the last one only."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss`` summed over ranks."""


class LocalEngine:
    """One process, no wrapper, no autocast: for a step's time, and for comparing gradients."""

    loss_scale = 1.0

    def __init__(self, network: Network) -> None:
        self.network = self.bare = network

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing is exchanged."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``."""
        loss.backward()  # type: ignore[no-untyped-call]


def embed_first(network: torch.nn.Module, views: ViewBatch, delta: Tensor | None, *, record: bool) -> Embeddings:
    """The strong view's embeddings, through the stem's weight plus ``delta``.

    Args:
        record: whether BatchNorm's running statistics take note. Only one clean pass of a view and step may: the
            adversarial one sees weights that no evaluation will.
    """
    embeddings: Embeddings = network(views.x1, delta, FIRST if record else None)
    return embeddings


def embed_second(network: torch.nn.Module, views: ViewBatch, delta: Tensor | None, *, record: bool) -> Embeddings:
    """The weak view's embeddings, in the order of the strong view's rows."""
    order, slot = views.second_order, SECOND if record else None
    if order is None:
        embeddings: Embeddings = network(views.x2, delta, slot)
        return embeddings
    z, g = network(views.x2[order], delta, slot)
    back = torch.argsort(order)
    return Embeddings(z[back], g[back])


def parameters_of(engine: Engine) -> list[Tensor]:
    """The trainable parameters, in the network's order."""
    return [p for p in engine.bare.parameters() if p.requires_grad]


def carry(pairs: Sequence[tuple[Tensor, Tensor]], scale: float) -> Tensor:
    """A scalar whose gradient with respect to each tensor is the given one over ``scale``."""
    return given_gradient(pairs[0][0].new_zeros(()), [(tensor, gradient / scale) for tensor, gradient in pairs])
