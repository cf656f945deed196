"""Training-mode BatchNorm over groups of consecutive rows, all groups at once.

On a GPU, Triton kernels (``models.gpu``) read channels_last rows as they lie, where a group's pixels are consecutive.
Elsewhere torch's kernel takes a group's channels for channels of their own: rows (G s, C, H, W) become (s, G C, H, W),
at the cost of one copy in and one out.

Shapes: G groups of s rows, C channels.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ca2cl.models.gpu import group_ops

_HAS_TRITON = find_spec("triton") is not None


def group_batch_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, group: int, eps: float, native: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised rows, and every group's mean and unbiased variance (G, C).

    Args:
        x_BCHW: rows, a whole number of groups, in the precision of the weight or a lower one.
        weight_C: scale.
        bias_C: shift.
        group: s, consecutive rows of a group.
        eps: added to the variance.
        native: use torch's kernel on every device.
    """
    if not native and _has_kernels(x_BCHW, weight_C):
        return fused_group_batch_norm(x_BCHW, weight_C, bias_C, group, eps)
    found: tuple[Tensor, Tensor, Tensor] = _Groups.apply(x_BCHW, weight_C, bias_C, group, eps)
    return found


def _has_kernels(x_BCHW: Tensor, weight_C: Tensor) -> bool:
    """Whether the Triton kernels take such tensors; the meta device stands for a GPU that has Triton."""
    return (
        (x_BCHW.is_meta or (x_BCHW.is_cuda and _HAS_TRITON))
        and x_BCHW.is_contiguous(memory_format=torch.channels_last)
        and x_BCHW.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight_C.dtype == torch.float32
    )


def fused_group_batch_norm(
    x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, group: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``group_batch_norm``, by the Triton kernels; the order of every sum is fixed.

    Args:
        x_BCHW: rows in channels_last, fp32 or half precision.
        weight_C: scale, fp32.
        bias_C: shift, fp32.
        group: s, consecutive rows of a group.
        eps: added to the variance.
    """
    pixels = group * x_BCHW.shape[2] * x_BCHW.shape[3]
    statistics_3GC = group_ops.statistics(group_ops.moments(x_BCHW.detach(), group), pixels, eps)
    mean_GC, _, var_GC = statistics_3GC.unbind()
    return _FusedGroups.apply(x_BCHW, weight_C, bias_C, statistics_3GC, group), mean_GC, var_GC


class _FusedGroups(torch.autograd.Function):
    # Statistics come in and do not go out: autograd would fill a gradient of zeros for each of them.
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, statistics_3GC: Tensor, group: int
    ) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_C, statistics_3GC)
        ctx.group = group
        out: Tensor = group_ops.normalize(x_BCHW, statistics_3GC, weight_C, bias_C, group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_C, statistics_3GC = ctx.saved_tensors
        grad_BCHW = grads[0].contiguous(memory_format=torch.channels_last)
        sums_G2C = group_ops.gradient_sums(grad_BCHW, x_BCHW, statistics_3GC, ctx.group).sum(1)
        grad_x = group_ops.input_gradient(grad_BCHW, x_BCHW, statistics_3GC, weight_C, sums_G2C, ctx.group)
        grad_bias, grad_weight = sums_G2C.sum(0)
        return grad_x, grad_weight, grad_bias, None, None


class _Groups(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight_C: Tensor, bias_C: Tensor, group: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups = len(x_BCHW) // group
        x = _side_by_side(x_BCHW, group)
        weight = weight_C.repeat(groups)
        # With a momentum of 1 running statistics are this batch's: the mean and the unbiased variance.
        mean, var = weight.new_zeros(2, len(weight)).unbind()
        out, save_mean, save_scale = torch.native_batch_norm(
            x, weight, bias_C.repeat(groups), mean, var, True, 1.0, eps
        )
        ctx.save_for_backward(x, weight, save_mean, save_scale)
        ctx.group, ctx.eps = group, eps
        mean_GC, var_GC = mean.view(groups, -1), var.view(groups, -1)
        ctx.mark_non_differentiable(mean_GC, var_GC)
        return _in_a_row(out, groups), mean_GC, var_GC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        groups = len(grads[0]) // ctx.group
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            _side_by_side(grads[0], ctx.group), x, weight, None, None, mean, scale, True, ctx.eps, [True, True, True]
        )
        sums = (part.view(groups, -1).sum(0) for part in (grad_weight, grad_bias))
        return _in_a_row(grad_x, groups), *sums, None, None


def _side_by_side(x_BCHW: Tensor, group: int) -> Tensor:
    """(G s, C, H, W) as (s, G C, H, W), channels_last."""
    batch, channels, height, width = x_BCHW.shape
    x_GSHWC = x_BCHW.permute(0, 2, 3, 1).reshape(batch // group, group, height, width, channels)
    return x_GSHWC.permute(1, 2, 3, 0, 4).reshape(group, height, width, -1).permute(0, 3, 1, 2)


def _in_a_row(x_SDHW: Tensor, groups: int) -> Tensor:
    """The way back."""
    group, _, height, width = x_SDHW.shape
    x_GSHWC = x_SDHW.permute(0, 2, 3, 1).reshape(group, height, width, groups, -1).permute(3, 0, 1, 2, 4)
    shape = groups * group, x_GSHWC.shape[-1], height, width
    # A tensor of its own and no view: activations may overwrite it.
    out = torch.empty(shape, dtype=x_SDHW.dtype, device=x_SDHW.device, memory_format=torch.channels_last)
    out.permute(0, 2, 3, 1).view(x_GSHWC.shape).copy_(x_GSHWC)
    return out
