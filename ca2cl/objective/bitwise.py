"""The step's gradient, the same to the last bit on any number of processes and micro-batches.

Exact accumulation leaves two things to the hardware: the shapes that the kernels see, and the order in which a
parameter's gradient is added up. Either changes the last bits, and these do not stay small: a change of one unit in the
last place of one weight moves activations by 1e-6 at the top of a ResNet, which sooner or later takes an activation to
the other side of a ReLU, and one such in the projector is 4e-3 of the gradient (measured: README). So here

- all passes are of ``unit`` rows: a block of normalisation groups, whose members are the same on any hardware;
- every unit's gradient of a parameter is added in double precision, where adding fp32 numbers rounds so far below
  their last bit that the order does not show;
- the sum over ranks is taken in double precision too, and the engine gets a gradient that is whole already.

The loss gives a row's gradient independently of who asks (``nt_xent``), and so does the stem (``model.stem``). What it
costs: passes of few rows, 8 bytes a parameter for the sums, and an all-reduce of twice the bytes. It wants kernels that
give the same bits when they are called twice, as many threads a process, and for the averaging of ranks a power of two
of them. Where clipping sets in, engines still differ: each adds up the gradient's norm in its own order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ca2cl.model.encoder import Encoder
from ca2cl.model.heads import Embeddings, Network
from ca2cl.objective.gather import all_sum, world
from ca2cl.objective.passes import Engine, ViewBatch, carry

Step = Callable[[Engine, Sequence[ViewBatch]], dict[str, Tensor]]


class _AddInDouble(torch.autograd.Function):
    """``value``, whose gradient is added to ``total`` where a backward pass asks for that of ``handle``.

    In place, and no gradient is returned: one in double precision a unit and parameter would double the time.
    """

    @staticmethod
    def forward(ctx: Any, handle: Tensor, value: Tensor, total: Tensor) -> Tensor:
        ctx.total = total
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[None, None, None]:
        ctx.total.add_(outer[0])
        return None, None, None


class UnitNetwork:
    """A network that goes through ``unit`` rows at a time, and whose parameters' gradients are added in double
    precision: call it like ``Network``.

    Raises:
        AssertionError: rows that are no whole number of units.
    """

    def __init__(self, network: Network, unit: int) -> None:
        self.network, self.unit = network, unit
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        # One memory layout whatever the engine wants of its weights: kernels of another one round otherwise.
        self.values = {name: _channels_last(p.detach()) for name, p in self.trained.items()}
        self.totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self.values.items()}
        self.handles = {name: p.new_zeros((), requires_grad=True) for name, p in self.trained.items()}

    @property
    def encoder(self) -> Encoder:
        """The encoder inside."""
        return self.network.encoder

    def parameters(self) -> Iterator[Tensor]:
        """What to ask the gradient of: none is returned, it is in ``totals`` then."""
        return iter(self.handles.values())

    def __call__(self, x_BCHW: Tensor, stem_delta: Tensor | None = None, slot: int | None = None) -> Embeddings:
        """Embeddings of one view."""
        assert len(x_BCHW) % self.unit == 0, (len(x_BCHW), self.unit)
        if stem_delta is None:  # the stem's gradient is then row by row here too
            stem_delta = torch.zeros_like(self.encoder.conv1.weight)
        parts = [self._one_unit(rows, stem_delta, slot) for rows in torch.split(x_BCHW, self.unit)]
        return Embeddings(*(torch.cat(kind) for kind in zip(*parts, strict=True)))

    def _one_unit(self, *arguments: Any) -> Embeddings:
        values = {
            name: _AddInDouble.apply(self.handles[name], value, self.totals[name])
            for name, value in self.values.items()
        }
        embeddings: Embeddings = functional_call(self.network, values, arguments)
        return embeddings


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


class _Collector:
    """An engine that keeps the gradient in a ``UnitNetwork``."""

    def __init__(self, network: UnitNetwork, loss_scale: float) -> None:
        self.network = self.bare = network
        self.loss_scale = loss_scale

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]


def bitwise_step(step: Step, engine: Engine, micro_batches: Sequence[ViewBatch], unit: int) -> dict[str, Tensor]:
    """``step`` on units of that many rows; ``engine`` then gets the whole gradient on every rank, in one backward."""
    network = UnitNetwork(engine.bare, unit)
    shares = step(_Collector(network, engine.loss_scale), micro_batches)  # type: ignore[arg-type]
    whole = all_sum(torch.cat([total.flatten() for total in network.totals.values()]))
    parts = torch.split(whole, [total.numel() for total in network.totals.values()])
    pairs = [(p, part.view_as(p).to(p.dtype)) for p, part in zip(network.trained.values(), parts, strict=True)]
    with engine.micro_step(last=True):
        engine.backward(carry(pairs, engine.loss_scale * world()[1]))
    return shares
