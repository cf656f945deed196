"""Activation checkpointing: blocks are computed again in the backward pass.

A block keeps only its input.

torch's own (non-reentrant) ``checkpoint`` does it. It runs a block's forward after the pass has ended, when the layers
no longer know which pass that was: the view that BatchNorm records running statistics for, the rows' draws of drop
path. Layers with such state have a method ``replay``, and a block restores it for the time of its second forward.

A block becomes a subclass of its own class, as ``torch.nn.utils.parametrize`` does it: names of parameters stay, and a
copy of the block (``methods.bitwise``) computes with the copy's own layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import cache, partial
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Restore = Callable[[], AbstractContextManager[None]]


@runtime_checkable
class PerPass(Protocol):
    """A layer whose forward depends on the pass that it is part of."""

    def replay(self) -> Restore:
        """Makes contexts in which a forward computes what it would compute now, and records nothing."""


class Recomputed:
    """Mixin of a block that does not keep its activations while autograd records."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        forward = super().forward  # type: ignore[misc]
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        assert isinstance(self, nn.Module)
        # No layer draws random numbers while it computes: there is no generator to restore.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, self), **kwargs
        )


def recompute(blocks: Iterable[nn.Module], enable: bool = True) -> None:
    """Let each of ``blocks`` compute its activations again in the backward pass, or keep them as it did at first."""
    for block in blocks:
        kind = type(block)
        if enable and not issubclass(kind, Recomputed):
            block.__class__ = _recomputed(kind)  # type: ignore[arg-type]
        elif not enable and issubclass(kind, Recomputed):
            block.__class__ = kind.__mro__[2]


@cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Recomputed{kind.__name__}", (Recomputed, kind), {"__module__": kind.__module__})


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For the first forward and for those of backward passes."""
    return nullcontext(), _Replay([layer.replay() for layer in block.modules() if isinstance(layer, PerPass)])


class _Replay(AbstractContextManager[None]):
    """Contexts together; entered once in each backward pass through the graph."""

    def __init__(self, restores: list[Restore]) -> None:
        self._restores = restores

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for restore in self._restores:
                stack.enter_context(restore())
            self._entered = stack.pop_all()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.__exit__(kind, error, trace)
