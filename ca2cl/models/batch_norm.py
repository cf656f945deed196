"""BatchNorm over chosen samples, ranks or groups.

``sync`` takes the statistics of a forward pass over all processes. torch's SyncBatchNorm refuses CPU tensors in a
process group and breaks ``torch.compile`` graphs (pytorch#161302); this one is three all-reduces and serves every
device. ``lane_group`` takes them over runs of ``group`` consecutive rows: whose samples these are does not
depend on the hardware (``data.groups``), and no pass needs a collective. ``frozen`` normalises by the running
statistics and never changes them.

Running statistics are recorded by the passes that are told to, and moved by ``commit_statistics``, once a view and
step, however many micro-batches and processes shared the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["sync", "frozen", "lane_group"]


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sync(torch.autograd.Function):
    """BatchNorm over the rows of all ranks. Returns the normalised rows, the mean and the unbiased variance.

    What comes out does not depend on who held which rows: sums are one fp32 number a tile, added in double precision.
    Weight and bias get the whole gradient on every rank, over W, for the engine adds up the ranks'.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x_BCHW.to(weight_C.dtype)
        # The mean first and then squared deviations: one pass of E[x^2] - E[x]^2 cancels in fp32.
        count = x.numel() // x.shape[1]
        totals = _all_sum(torch.cat([_sum(x), x.new_tensor([count], dtype=torch.float64)]))
        number = totals[-1]
        mean_C = (totals[:-1] / number).to(x.dtype)
        centred = x - mean_C[:, None, None]
        var_C = _all_sum(_sum(centred.square())) / number
        scale_C = torch.rsqrt(var_C + eps).to(x.dtype)
        unit = centred * scale_C[:, None, None]
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, scale_C, number)
        out = unit * weight_C[:, None, None] + bias_C[:, None, None]
        unbiased_C = (var_C * number / (number - 1)).to(x.dtype)
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return out.to(x_BCHW.dtype), mean_C, unbiased_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_C, scale_C, number = ctx.saved_tensors
        grad = grads[0].to(weight_C.dtype)
        unit = (x_BCHW.to(weight_C.dtype) - mean_C[:, None, None]) * scale_C[:, None, None]
        sums = _all_sum(torch.cat([_sum(grad), _sum(grad * unit)]))
        mean_grad_C, mean_product_C = (sums / number).to(grad.dtype).chunk(2)
        inner = grad - mean_grad_C[:, None, None] - unit * mean_product_C[:, None, None]
        grad_x = inner * (weight_C * scale_C)[:, None, None]
        grad_bias_C, grad_weight_C = (sums / _world()).to(grad.dtype).chunk(2)
        return grad_x.to(x_BCHW.dtype), grad_weight_C, grad_bias_C, None


def _sum(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.sum((2, 3), dtype=torch.float64).to(x_BCHW.dtype).sum(0, dtype=torch.float64)


def _all_sum(x: Tensor) -> Tensor:
    if _world() > 1:
        dist.all_reduce(x := x.clone())
    return x


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the project's modes; its state keys are torchvision's.

    Attributes:
        norm: whose samples the statistics are taken over while training.
        group: consecutive rows that share them, where ``norm`` is lane_group.
        slot: the view whose running statistics a pass records, or None: none are recorded.
        reproducible: sync works on one process as on several, and not by torch's own kernel, which rounds otherwise.
    """

    def __init__(self, num_features: int, norm: Norm = "sync", group: int = 16) -> None:
        super().__init__(num_features)
        self.norm = norm
        self.group = group
        self.slot: int | None = None
        self.reproducible = False
        self._recorded: dict[int, Tensor] = {}

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise (B, C, H, W); the statistics follow ``norm`` while training and the running ones otherwise."""
        if not self.training or self.norm == "frozen":
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if self.norm == "lane_group":
            return self._forward_groups(x_BCHW)
        if _world() > 1 or self.reproducible:
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
        assert len(x_BCHW) % self.group == 0, (len(x_BCHW), self.group)
        # One call a group and not one for all: a group's result is then the same bits whatever it is passed along with.
        return torch.cat([self._forward_local(rows) for rows in torch.split(x_BCHW, self.group)])

    def _forward_sync(self, x_BCHW: Tensor) -> Tensor:
        """Statistics over every process's samples."""
        out: Tensor
        out, mean_C, var_C = _Sync.apply(x_BCHW, self.weight, self.bias, self.eps)
        if self.slot is not None:
            self._record(mean_C, var_C)
        return out

    @torch.no_grad()
    def _record(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        """Add one group's statistics to the slot's: sums of means and of variances, and how many."""
        assert self.slot is not None
        # in double precision: what the sum over groups and ranks is then does not depend on its order
        row = torch.cat([mean_C, unbiased_var_C, mean_C.new_ones(1)]).double()
        self._recorded[self.slot] = self._recorded[self.slot] + row if self.slot in self._recorded else row

    def take_recorded(self) -> list[Tensor]:
        """What was recorded since the last call, a (2 C + 1) row a view in the views' order."""
        rows = [self._recorded[slot] for slot in sorted(self._recorded)]
        self._recorded = {}
        return rows

    @torch.no_grad()
    def track(self, row: Tensor) -> None:
        """Move the running statistics towards one view's: the mean over its groups."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None and self.momentum is not None
        mean_C, var_C = (row[:-1] / row[-1]).to(self.running_mean.dtype).chunk(2)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean_C, self.momentum)
        self.running_var.lerp_(var_C, self.momentum)


def norm_layer(norm: Norm, group: int = 16) -> partial[BatchNorm]:
    """The ``norm_layer`` that torchvision's ResNet takes, in one of our modes."""
    return partial(BatchNorm, norm=norm, group=group)


def _layers(module: nn.Module) -> list[BatchNorm]:
    return [layer for layer in module.modules() if isinstance(layer, BatchNorm)]


@contextmanager
def recording(module: nn.Module, slot: int | None) -> Iterator[None]:
    """For which view the BatchNorms of ``module`` record running statistics inside this block; None: for none."""
    layers = _layers(module)
    for layer in layers:
        layer.slot = slot
    try:
        yield
    finally:
        for layer in layers:
            layer.slot = None


def commit_statistics(module: nn.Module) -> None:
    """Move the running statistics of ``module`` by what was recorded, one view after another; every rank calls it.

    lane_group's are averaged over the groups of all ranks, by one collective for all layers; sync's are the same on
    every rank already.
    """
    layers = _layers(module)
    rows = [(layer, row) for layer in layers for row in layer.take_recorded()]
    if not rows:
        return
    if _world() > 1 and layers[0].norm == "lane_group":
        together = torch.cat([row for _, row in rows])
        dist.all_reduce(together)
        rows = [
            (layer, part)
            for (layer, _), part in zip(rows, torch.split(together, [len(row) for _, row in rows]), strict=True)
        ]
    for layer, row in rows:
        layer.track(row)
