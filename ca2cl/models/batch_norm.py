"""BatchNorm over chosen samples, ranks or groups.

``sync`` takes the statistics of a forward pass over all processes (``models.sync_batch_norm``). ``lane_group`` takes
them over runs of ``group`` consecutive rows: whose samples these are does not depend on the hardware
(``models.bn_groups``), and no pass needs a collective. ``frozen`` normalises by the running statistics and never
changes them.

Running statistics are updated once a view and step, on any number of micro-batches and processes: passes inside
``recording`` collect them, and ``commit_statistics`` applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ca2cl.models.group_batch_norm import group_batch_norm
from ca2cl.models.sync_batch_norm import reproducible_batch_norm, sync_batch_norm, world_size

Norm = Literal["sync", "frozen", "lane_group"]


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the project's modes; its state keys are torchvision's.

    Attributes:
        norm: whose samples the statistics are taken over while training.
        group: consecutive rows that share them, where ``norm`` is lane_group.
        slot: the view whose running statistics a pass records, or None: none are recorded.
        reproducible: sync rounds alike on any number of processes, one included (``reproducible_batch_norm``), and
            lane_group uses torch's own kernel on every device.
    """

    def __init__(self, num_features: int, norm: Norm = "sync", group: int = 16) -> None:
        super().__init__(num_features)
        self.norm = norm
        self.group = group
        self.slot: int | None = None
        self.reproducible = False
        self._recorded: dict[int, list[Tensor]] = {}
        self._replays = False

    def replay(self) -> Callable[[], AbstractContextManager[None]]:
        """As ``blocks.recompute.PerPass.replay``: the same kernels for the same view, whose statistics are recorded."""
        return partial(self._replaying, self.slot)

    @contextmanager
    def _replaying(self, slot: int | None) -> Iterator[None]:
        before = self.slot
        self.slot, self._replays = slot, True
        try:
            yield
        finally:
            self.slot, self._replays = before, False

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise (B, C, H, W); the statistics follow ``norm`` while training and the running ones otherwise."""
        if not self.training or self.norm == "frozen":
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.norm == "lane_group":
            return self._forward_groups(x_BCHW)
        if world_size() > 1 or self.reproducible:
            return self._forward_sync(x_BCHW)
        return self._forward_local(x_BCHW)

    def _forward_local(self, x_BCHW: Tensor) -> Tensor:
        """Statistics over these very rows."""
        if self.slot is None:
            return F.batch_norm(x_BCHW, None, None, self.weight, self.bias, True, 0.0, self.eps)
        # With a momentum of 1 the running statistics are this batch's: their mean and unbiased variance.
        mean_C, var_C = torch.zeros_like(self.bias), torch.zeros_like(self.bias)
        out = F.batch_norm(x_BCHW, mean_C, var_C, self.weight, self.bias, True, 1.0, self.eps)
        self._record(mean_C, var_C)
        return out

    def _forward_groups(self, x_BCHW: Tensor) -> Tensor:
        """Statistics over every run of ``group`` rows."""
        assert len(x_BCHW) % self.group == 0, (len(x_BCHW), self.group)
        # A CPU has nothing to gain from one large kernel, and pays for the copies that it needs.
        if x_BCHW.device.type == "cpu":
            return torch.cat([self._forward_local(rows) for rows in torch.split(x_BCHW, self.group)])
        out, mean_GC, var_GC = group_batch_norm(
            x_BCHW, self.weight, self.bias, self.group, self.eps, native=self.reproducible
        )
        if self.slot is not None:
            self._record(mean_GC, var_GC)
        return out

    def _forward_sync(self, x_BCHW: Tensor) -> Tensor:
        """Statistics over every process's samples."""
        normalize = reproducible_batch_norm if self.reproducible else sync_batch_norm
        out, mean_C, var_C = normalize(x_BCHW, self.weight, self.bias, self.eps)
        if self.slot is not None:
            self._record(mean_C, var_C)
        return out

    @torch.no_grad()
    def _record(self, mean_GC: Tensor, unbiased_var_GC: Tensor) -> None:
        """Keep the statistics of one group (C,) or of several (G, C) for the slot."""
        assert self.slot is not None
        if self._replays:
            return
        self._recorded.setdefault(self.slot, []).append(
            torch.cat([mean_GC, unbiased_var_GC], -1).view(-1, 2 * self.num_features)
        )

    def take_recorded(self) -> list[tuple[Tensor, int]]:
        """Statistics recorded since the last call, in the order of the views: for each the sum of means and variances
        over groups (2 C,) in double precision, and the number of groups."""
        found = [torch.cat(self._recorded[slot]) for slot in sorted(self._recorded)]
        self._recorded = {}
        # in double precision: the sum over groups and ranks then does not depend on its order
        return [(rows.sum(0, dtype=torch.float64), len(rows)) for rows in found]


def norm_layer(norm: Norm, group: int = 16) -> partial[BatchNorm]:
    """The ``norm_layer`` that torchvision's ResNet takes, in one of our modes."""
    return partial(BatchNorm, norm=norm, group=group)


def _layers(module: nn.Module) -> list[BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@contextmanager
def recording(module: nn.Module, slot: int | None) -> Iterator[None]:
    """Record running statistics of ``module`` for the view ``slot`` inside this block; None records none."""
    layers = _layers(module)
    for layer in layers:
        layer.slot = slot
    try:
        yield
    finally:
        for layer in layers:
            layer.slot = None


@torch.no_grad()
def commit_statistics(module: nn.Module) -> None:
    """Move the running statistics of ``module`` by what was recorded, one view after another; every rank calls it.

    Each view's are averaged over its groups. lane_group's groups are those of all ranks, by one collective for all
    layers; sync's statistics are the same on every rank already.
    """
    recorded = [(layer, view, *row) for layer in _layers(module) for view, row in enumerate(layer.take_recorded())]
    if not recorded:
        return
    layers, views, sums, groups = zip(*recorded, strict=True)
    together, ranks = torch.cat(sums), 1
    if world_size() > 1 and layers[0].norm == "lane_group":
        ranks = world_size()
        dist.all_reduce(together)
    sizes = [len(row) for row in sums]
    means = torch._foreach_div(torch.split(together, sizes), [float(ranks * number) for number in groups])
    rows = torch.split(torch.cat(means).to(layers[0].weight.dtype), sizes)
    for view in range(max(views) + 1):
        _track([(layer, row) for layer, its, row in zip(layers, views, rows, strict=True) if its == view])


def _track(rows: list[tuple[Any, Tensor]]) -> None:
    """Move running statistics towards one view's means and variances (2 C,); a few kernels for all layers."""
    for momentum in {layer.momentum for layer, _ in rows}:
        layers = [layer for layer, _ in rows if layer.momentum == momentum]
        halves = [row.chunk(2) for layer, row in rows if layer.momentum == momentum]
        torch._foreach_add_([layer.num_batches_tracked for layer in layers], 1)
        torch._foreach_lerp_([layer.running_mean for layer in layers], [mean for mean, _ in halves], momentum)
        torch._foreach_lerp_([layer.running_var for layer in layers], [var for _, var in halves], momentum)
