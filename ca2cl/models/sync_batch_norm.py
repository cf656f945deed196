"""Training-mode BatchNorm with statistics over all processes.

torch's ``SyncBatchNorm`` refuses CPU tensors in a process group and breaks ``torch.compile`` graphs (pytorch#161302).
``sync_batch_norm`` reads and writes as little, on every device: one kernel for the statistics, one collective and one
kernel that normalises; backward two reductions in one kernel, one collective and one point-wise kernel (two on a CPU).
``reproducible_batch_norm`` is for ``bitwise`` alone: its rounding does not depend on which rank holds a row, at about
eight times the memory traffic.

Both give the gradient of weight and bias whole on every rank, over W: the engine adds up the ranks'.

Shapes: B local rows, C channels, W ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def world_size() -> int:
    """W; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sync_batch_norm(x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, and the mean and unbiased variance over the rows of all ranks.

    Args:
        x_BCHW: this rank's rows, in the precision of the weight or a lower one.
        weight_C: scale.
        bias_C: shift.
        eps: added to the variance.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Sync.apply(x_BCHW, weight_C, bias_C, eps)
    return found


def reproducible_batch_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``sync_batch_norm``, to the last bit alike however the rows are shared out.

    A sum is one number a row in the weight's precision, and these are added in double precision.

    Args:
        x_BCHW: this rank's rows.
        weight_C: scale.
        bias_C: shift.
        eps: added to the variance.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Reproducible.apply(x_BCHW, weight_C, bias_C, eps)
    return found


class _Sync(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        world = world_size()
        ctx.number = number = world * x_BCHW.numel() // x_BCHW.shape[1]
        # Ranks, which have equally many rows, average moments about 0. In fp32 their difference would cancel.
        moments_2C = _statistics(x_BCHW).double()
        moments_2C[1].addcmul_(moments_2C[0], moments_2C[0])
        if world > 1:
            dist.all_reduce(moments_2C.div_(world))
        moments_2C[1].addcmul_(moments_2C[0], moments_2C[0], value=-1.0).clamp_(min=0.0)
        mean_C, var_C = moments_2C.to(weight_C.dtype)
        ctx.save_for_backward(x_BCHW, weight_C, mean_C, var_C)
        ctx.eps = eps
        unbiased_C = var_C * (number / (number - 1))
        ctx.mark_non_differentiable(mean_C, unbiased_C)
        return F.batch_norm(x_BCHW, mean_C, var_C, weight_C, bias_C, False, 0.0, eps), mean_C, unbiased_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, mean_C, var_C = ctx.saved_tensors
        # torch's kernel for evaluation mode reduces the gradients of weight and bias, about the statistics it is given.
        _, grad_weight_C, grad_bias_C = torch.ops.aten.native_batch_norm_backward(
            grads[0], x_BCHW, weight_C, mean_C, var_C, None, None, False, ctx.eps, [False, True, True]
        )
        sums_2C = torch.stack([grad_bias_C, grad_weight_C])
        if world_size() > 1:  # in double precision: the order of ranks does not show
            sums_2C = sums_2C.double()
            dist.all_reduce(sums_2C.div_(world_size()))
            sums_2C = sums_2C.to(weight_C.dtype)
        rows = ctx.number // world_size()  # of a rank, as the sums are
        grad_x = _input_gradient(grads[0], x_BCHW, weight_C, mean_C, var_C, sums_2C, rows, ctx.eps)
        return grad_x, sums_2C[1], sums_2C[0], None


# torch's kernels, as operators of our own: these have no meta kernels, which fake devices and torch.compile want.
@torch.library.custom_op("ca2cl::batch_norm_statistics", mutates_args=())
def _statistics(x_BCHW: Tensor) -> Tensor:
    """Mean and biased variance of the local rows (2, C), in fp32 or, of double precision, in double."""
    running_C = None
    if x_BCHW.device.type == "cpu":  # there the result has the precision of running statistics, where they are given
        running_C = x_BCHW.new_zeros(x_BCHW.shape[1], dtype=torch.promote_types(x_BCHW.dtype, torch.float32))
    return torch.stack(torch.ops.aten.batch_norm_update_stats(x_BCHW, running_C, running_C, 0.0))


@_statistics.register_fake
def _(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.new_empty(2, x_BCHW.shape[1], dtype=torch.promote_types(x_BCHW.dtype, torch.float32))


@torch.library.custom_op("ca2cl::batch_norm_input_gradient", mutates_args=())
def _input_gradient(
    grad_BCHW: Tensor,
    x_BCHW: Tensor,
    weight_C: Tensor,
    mean_C: Tensor,
    var_C: Tensor,
    sums_2C: Tensor,
    rows: int,
    eps: float,
) -> Tensor:
    """w r [g - mean(g) - u mean(g u)] with u = r (x - m), in the precision of ``x_BCHW``.

    Args:
        grad_BCHW: g, of the output.
        x_BCHW: x, the input.
        weight_C: w.
        mean_C: m.
        var_C: v, with r = 1 / sqrt(v + eps).
        sums_2C: sums of g and of g u.
        rows: over which these are.
        eps: added to the variance.
    """
    scale_C = torch.rsqrt(var_C + eps)
    if x_BCHW.is_cuda:  # what torch's SyncBatchNorm calls
        count = torch.full((1,), rows, dtype=torch.int32, device=x_BCHW.device)
        grad_x: Tensor = torch.batch_norm_backward_elemt(
            grad_BCHW, x_BCHW, mean_C, scale_C, weight_C, sums_2C[0], sums_2C[1] / scale_C, count
        )
        return grad_x
    # a g + b x + c
    a_C = weight_C * scale_C
    mean_grad_C, mean_product_C = sums_2C / rows
    b_C = -a_C * scale_C * mean_product_C
    c_C = -a_C * mean_grad_C - b_C * mean_C
    a, b, c = (part[:, None, None] for part in (a_C, b_C, c_C))
    total = torch.addcmul(c, grad_BCHW.to(weight_C.dtype), a).addcmul_(x_BCHW.to(weight_C.dtype), b)
    return total.to(x_BCHW.dtype)


@_input_gradient.register_fake
def _(grad_BCHW: Tensor, x_BCHW: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x_BCHW)


class _Reproducible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x_BCHW.to(weight_C.dtype)
        # The mean first and then squared deviations: one pass of E[x^2] - E[x]^2 cancels in fp32.
        count = x.numel() // x.shape[1]
        totals = _all_sum(torch.cat([_sum(x), x.new_full((1,), count, dtype=torch.float64)]))
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
        grad_bias_C, grad_weight_C = (sums / world_size()).to(grad.dtype).chunk(2)
        return grad_x.to(x_BCHW.dtype), grad_weight_C, grad_bias_C, None


def _sum(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.sum((2, 3), dtype=torch.float64).to(x_BCHW.dtype).sum(0, dtype=torch.float64)


def _all_sum(x: Tensor) -> Tensor:
    """``x``, a new tensor, summed over ranks in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x
