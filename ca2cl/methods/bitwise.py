"""Gradient that is bit-identical for any number of processes and micro-batches.

Exact accumulation leaves two things to the hardware: the shapes that the kernels see, and the order in which a
parameter's gradient is added up. Either changes the last bits, and these do not stay small: a change of one unit in the
last place of one weight moves activations by 1e-6 at the top of a ResNet, which sooner or later takes an activation to
the other side of a ReLU, and one such in the projector is 4e-3 of the gradient (docs/reproducibility.md). So here

- every layer goes through ``unit`` rows at a time: a block of normalisation groups, whose members are the same on any
  hardware;
- every unit's gradient of a parameter is added in double precision, which has 29 bits to spare for fp32 numbers, so
  that the order does not show (``sync``: a tile's part of the statistics likewise);
- the sum over ranks is taken in double precision too, and the engine gets a gradient that is whole already.

The loss gives a row's gradient independently of who asks (``nt_xent``), and so does the stem
(``models.perturbed_conv``). What it costs: layers of few rows, 8 bytes a parameter for the sums, and an all-reduce of
twice the bytes. It wants kernels that give the same bits when they are called twice (``pretrain.numerics`` fixes
threads and kernels), and for the averaging of ranks a power of two of them. Where clipping sets in, engines still
differ: each adds up the gradient's norm in its own order.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ca2cl.methods.base import Engine, Method
from ca2cl.methods.gather import all_sum, world
from ca2cl.methods.two_views import carry
from ca2cl.models.backbone import Backbone
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.blocks.drop_path import RowDraws, row_draws
from ca2cl.models.perturbed_conv import Stem


class Bitwise:
    """A method's step on units of ``unit`` rows; the engine then gets the whole gradient on every rank, in one backward
    (``training.loop.Method``).

    Args:
        method: one of exact accumulation.
        unit: rows of a block of normalisation groups.
    """

    def __init__(self, method: Method, unit: int) -> None:
        self.method, self.unit, self.counters = method, unit, method.counters
        self.after_step = method.after_step

    def step(self, engine: Engine, micro_batches: Sequence[Any]) -> dict[str, Tensor]:
        """As ``Method.step``."""
        network = UnitNetwork(engine.bare, self.unit)
        terms = self.method.step(_Collector(network, engine.loss_scale), micro_batches)
        totals = [parameter.total for parameter in network.sums.values()]
        whole = all_sum(torch.cat([total.flatten() for total in totals]))
        parts = torch.split(whole, [total.numel() for total in totals])
        pairs = [(p, part.view_as(p).to(p.dtype)) for p, part in zip(network.trained.values(), parts, strict=True)]
        with engine.micro_step(last=True):
            engine.backward(carry(pairs, engine.loss_scale * world()[1]))
        return terms


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


class _Parameter:
    """A trained parameter's value, and its gradient as a sum in double precision."""

    def __init__(self, parameter: Tensor) -> None:
        # One memory layout whatever the engine wants of its weights: kernels of another one round otherwise.
        self.value = _channels_last(parameter.detach())
        self.total = torch.zeros_like(self.value, dtype=torch.float64)
        self.handle = parameter.new_zeros((), requires_grad=True)

    def once(self) -> Tensor:
        """The value, for one use: the use's gradient is added to the sum."""
        used: Tensor = _AddInDouble.apply(self.handle, self.value, self.total)
        return used


class _Layer(nn.Module):
    """A layer with parameters of its own, which goes through ``unit`` rows at a time; None: through all."""

    def __init__(
        self, layer: nn.Module, parameters: dict[str, _Parameter], unit: int | None, draws: RowDraws | None
    ) -> None:
        super().__init__()
        self.layer, self.own, self.unit, self.draws = layer, parameters, unit, draws

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        assert self.unit is None or len(x) % self.unit == 0, (len(x), self.unit)
        parts = []
        for number, rows in enumerate(torch.split(x, self.unit or len(x))):
            values = {name: parameter.once() for name, parameter in self.own.items()}
            # a layer may hold others, drop path among them
            with nullcontext() if self.draws is None else self.draws.rows(number * len(rows), len(rows), len(x)):
                parts.append(functional_call(self.layer, values, (rows, *others)))
        return torch.cat(parts)


class UnitNetwork:
    """A network whose layers go through ``unit`` rows at a time, and whose parameters' gradients are added in double
    precision: call it like the network. BatchNorm over all rows (sync) is the one layer that sees them together.

    Raises:
        AssertionError: rows that are no whole number of units.
    """

    def __init__(self, network: Any, unit: int) -> None:
        self.bare, self.unit, self.draws = network, unit, row_draws(network)
        self.trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
        self.sums = {name: _Parameter(p) for name, p in self.trained.items()}
        self.network = self._twin(network, "")

    def _twin(self, module: nn.Module, name: str) -> nn.Module:
        """``module`` with its layers replaced; what they hold is shared."""
        own = {key: self.sums[f"{name}{key}"] for key, p in module.named_parameters(recurse=False) if p.requires_grad}
        twin = copy.copy(module)
        if isinstance(twin, (BatchNorm, Stem)):
            twin.reproducible = True
        if isinstance(twin, BatchNorm):
            return _Layer(twin, own, None if twin.norm == "sync" else self.unit, self.draws)
        twin._modules = {key: self._twin(child, f"{name}{key}.") for key, child in module.named_children()}
        return _Layer(twin, own, self.unit, self.draws) if own else twin

    @property
    def encoder(self) -> Backbone:
        """The encoder itself."""
        encoder: Backbone = self.bare.encoder
        return encoder

    def modules(self) -> Iterator[nn.Module]:
        """Those of the network itself: its BatchNorms hold what the passes recorded."""
        return self.bare.modules()  # type: ignore[no-any-return]

    def parameters(self) -> Iterator[Tensor]:
        """What to ask the gradient of: none is returned, it is in the sums then."""
        return (parameter.handle for parameter in self.sums.values())

    def __call__(
        self, x_BCHW: Tensor, stem_delta: Tensor | None = None, slot: int | None = None, *words_B: Tensor
    ) -> Any:
        """Embeddings of one view."""
        if stem_delta is None:  # the stem's gradient is then row by row here too
            stem_delta = torch.zeros_like(self.encoder.stem.weight)
        return self.network(x_BCHW, stem_delta, slot, *words_B)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


class _Collector:
    """An engine that keeps the gradient in a ``UnitNetwork``."""

    sharded = False

    def __init__(self, network: UnitNetwork, loss_scale: float | Tensor) -> None:
        self.network: Any = network
        self.bare: Any = network
        self.loss_scale = loss_scale

    def micro_step(self, *, last: bool) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale).backward()  # type: ignore[no-untyped-call]

    def whole(self, parameter: Tensor) -> Tensor:
        return parameter
