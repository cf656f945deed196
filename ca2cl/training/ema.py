"""Exponential moving average of weights and buffers.

After every optimizer step, a <- a + (1 - d) (w - a), in the weights' own precision, of as much of them as this rank
holds: all under DistributedDataParallel and ZeRO, its rows under FSDP2. The result is the same on every engine, to the
last bit where the weights are. Difference, product and sum are three kernels, each of which rounds a number without
regard to its place in memory: that differs between engines, and a fused kernel (``lerp``) need not round alike
everywhere.

BatchNorm's running statistics are averaged like the weights, and not copied from the network: they are then those of
the same steps as the weights that they go with. Counters are copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Ema:
    """The average of some tensors, which starts as they are now.

    Args:
        live: gives the tensors by name, which share the network's memory.
        decay: d, below 1.
    """

    def __init__(self, live: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        self.decay, self._live = decay, live
        self._average = {name: value.clone() for name, value in live().items()}
        kinds = {(value.dtype, value.device) for value in self._average.values()}
        self._names = [[name for name, x in self._average.items() if (x.dtype, x.device) == kind] for kind in kinds]

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Take note of the tensors after an optimizer step.

        Args:
            skipped: whether there was none, on the device: the host does not wait for it.
        """
        now = self._live()
        for names in self._names:
            live, average = ([kept[name] for name in names] for kept in (now, self._average))
            if not live[0].is_floating_point():
                torch._foreach_copy_(average, live)
                continue
            share = ((~skipped).double() * (1.0 - self.decay)).to(live[0].device, live[0].dtype)
            change = torch._foreach_sub(live, average)
            torch._foreach_mul_(change, share)
            torch._foreach_add_(average, change)

    def state(self) -> dict[str, Tensor]:
        """The averages by name."""
        return dict(self._average)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of ``state``; a tensor that is not there begins again as it is now."""
        live = self._live()
        for name, value in self._average.items():
            value.copy_(state.get(name, live[name]))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the network has the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        live = self._live()
        for name, value in self._average.items():
            before = live[name].clone()
            live[name].copy_(value)
            value.copy_(before)
