"""Exponential moving average of a network's weights and buffers.

After every optimizer step, a <- a + (1 - d) (w - a), in the weights' own precision. Engines hold whole weights after a
step, ZeRO's included, and the average is of these: every rank computes it, and it is the same wherever the weights are.
Difference, product and sum are three kernels, each of which rounds a number without regard to its place in memory: that
differs between engines, and a fused kernel (``lerp``) need not round alike everywhere.

BatchNorm's running statistics are averaged like the weights, and not copied from the network: they are then those of
the same steps as the weights that they go with. Counters are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """The average of what ``network`` trains, and of its buffers; it starts as the network is now.

    Args:
        network: whose ``state_dict`` names the tensors. What is not trained (a teacher) is not averaged.
        decay: d, below 1.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        named = network.state_dict(keep_vars=True)
        live = {id(x): (name, x) for name, x in named.items() if x.requires_grad or not isinstance(x, nn.Parameter)}
        self._live = dict(live.values())
        self._average = {name: value.detach().clone() for name, value in self._live.items()}
        kinds = {(value.dtype, value.device) for value in self._live.values()}
        self._names = [[name for name, x in self._live.items() if (x.dtype, x.device) == kind] for kind in kinds]

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take note of the network's weights after an optimizer step.

        Args:
            skipped: whether there was none, on the device: the host does not wait for it.
        """
        for names in self._names:
            live, average = ([kept[name] for name in names] for kept in (self._live, self._average))
            if not live[0].is_floating_point():
                torch._foreach_copy_(average, live)
                continue
            share = ((~skipped).double() * (1.0 - self.decay)).to(live[0].device, live[0].dtype)
            change = torch._foreach_sub(live, average)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(average, change)

    def state(self) -> dict[str, Tensor]:
        """The average by the names of the network's ``state_dict``."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state``.

        Raises:
            RuntimeError: it is of another network.
        """
        if state.keys() != self._average.keys():
            differing = sorted(state.keys() ^ self._average.keys())
            raise RuntimeError(f"the averages differ in {differing[0]}")
        for name, value in self._average.items():
            value.copy_(state[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again with the weights as they are."""
        for name, value in self._average.items():
            value.copy_(self._live[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the network has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, value in self._average.items():
            before = self._live[name].clone()
            self._live[name].copy_(value)
            value.copy_(before)
