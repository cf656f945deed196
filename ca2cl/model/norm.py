"""BatchNorm whose samples and running statistics are ours to choose.

``sync`` takes the statistics of a forward pass over all processes. torch's SyncBatchNorm refuses CPU tensors in a
process group and breaks ``torch.compile`` graphs (pytorch#161302); this one is two differentiable all-reduces and
serves every device. ``frozen`` normalises by the running statistics and never changes them.
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


class _AllSum(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of every rank's gradient. torch's own differentiable all-reduce is
    deprecated, and its replacement has no gradient in torch 2.6."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _all_sum(x: Tensor) -> Tensor:
    total: Tensor = _AllSum.apply(x)
    return total


class BatchNorm(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` with the project's modes; its state keys are torchvision's."""

    def __init__(self, num_features: int, norm: Norm = "sync") -> None:
        super().__init__(num_features)
        self.norm = norm
        self.update_statistics = True

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Normalise (B, C, H, W); the statistics follow ``norm`` while training and the running ones otherwise."""
        assert self.running_mean is not None and self.running_var is not None
        if not self.training or self.norm == "frozen":
            return F.batch_norm(
                x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return self._forward_sync(x_BCHW)
        if not self.update_statistics:
            return F.batch_norm(x_BCHW, None, None, self.weight, self.bias, True, 0.0, self.eps)
        self._count()
        momentum = self._momentum()
        return F.batch_norm(
            x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps
        )

    def _forward_sync(self, x_BCHW: Tensor) -> Tensor:
        """Statistics over every process's samples, mean first and then squared deviations: one pass of
        E[x^2] - E[x]^2 cancels in fp32."""
        x = x_BCHW.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        totals_C1 = _all_sum(torch.cat([x.sum((0, 2, 3)), count]))
        number = totals_C1[-1].detach()
        mean_C = totals_C1[:-1] / number
        centred = x - mean_C[:, None, None]
        var_C = _all_sum(centred.square().sum((0, 2, 3))) / number
        if self.update_statistics:
            self._track(mean_C.detach(), var_C.detach() * number / (number - 1))
        scale_C = self.weight.float() * torch.rsqrt(var_C + self.eps)
        out = centred * scale_C[:, None, None] + self.bias.float()[:, None, None]
        return out.to(x_BCHW.dtype)

    def _count(self) -> None:
        assert self.num_batches_tracked is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)

    def _momentum(self) -> float:
        assert self.momentum is not None
        return self.momentum

    def _track(self, mean_C: Tensor, unbiased_var_C: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        self._count()
        with torch.no_grad():
            self.running_mean.lerp_(mean_C, self._momentum())
            self.running_var.lerp_(unbiased_var_C, self._momentum())


def norm_layer(norm: Norm) -> partial[BatchNorm]:
    """The ``norm_layer`` that torchvision's ResNet takes, in one of our modes."""
    return partial(BatchNorm, norm=norm)


@contextmanager
def statistics(module: nn.Module, *, update: bool) -> Iterator[None]:
    """Whether the BatchNorms of ``module`` update their running statistics inside this block.

    Only a clean view's pass may: the adversarial one sees weights that no evaluation will.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BatchNorm)]
    before = [layer.update_statistics for layer in layers]
    for layer in layers:
        layer.update_statistics = update
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.update_statistics = value
