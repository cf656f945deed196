"""Stem convolution whose weight takes a perturbation as an input.

The adversarial direction is a sum over the global batch. In fp32 the order of the sum decides its last bits, these the
sign of some activation that is almost 0, and a single ReLU that lets through on one machine and not on the other is a
thousandth of the gradient (measured). Where ``bitwise`` promises the same bits on any hardware, each row's contribution
is therefore computed by itself, and they are added in double precision, which leaves nothing to the order. It takes
three times as long as the convolution's own weight gradient, which serves everything else.

Shapes: B rows, P = positions of the output, D_in = 3 * 7 * 7 for a ResNet, 3 * 16 * 16 for patches of 16 pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_COLUMNS_AT_ONCE = 1 << 23
"""Most numbers of unfolded input in memory at a time (32 MB)."""


class Stem(nn.Conv2d):
    """A convolution of equal strides and of equal padding on both axes.

    Attributes:
        perturbation: used as ``delta`` where the caller of ``forward`` passes none, as timm's models do.
        reproducible: the gradient of ``delta`` and of the weight does not depend on how rows are shared out.
        same: the input is padded as by TensorFlow's SAME, whose odd pixel is on the right and at the bottom.
    """

    perturbation: Perturbation
    reproducible = False
    same = False

    @classmethod
    def of(cls, conv: nn.Conv2d, *, same: bool = False) -> Stem:
        """``conv`` as a stem, with its very weight and bias (and no number drawn); ``same`` as the attribute."""
        assert cls.fits(conv, same=same), conv
        bias = conv.bias is not None
        stem = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            cls, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=bias
        )
        assert isinstance(stem, cls)
        stem.weight, stem.bias = conv.weight, conv.bias
        stem.perturbation, stem.same = Perturbation(), same
        return stem

    @staticmethod
    def fits(conv: nn.Module, *, same: bool = False) -> bool:
        """Whether ``of`` takes it: a plain convolution of all channels, or one that only pads its input as ``same``."""
        return (
            isinstance(conv, nn.Conv2d)
            and (same or type(conv) in (nn.Conv2d, Stem))  # another kind computes something else
            and conv.groups == 1
            and set(conv.dilation) == {1}
            and isinstance(conv.padding, tuple)
            and len({*conv.stride}) == len({*conv.padding}) == 1
            and (not same or len({*conv.kernel_size}) == 1)
        )

    def forward(self, x_BCHW: Tensor, delta: Tensor | None = None) -> Tensor:
        """The convolution of ``x_BCHW`` through the weight plus ``delta``.

        Args:
            x_BCHW: images; where ``reproducible``, no gradient reaches them.
            delta: (out, in, k, k) in any precision. Its gradient is this rank's part of the sum, in that precision.
        """
        delta = self.perturbation.delta if delta is None else delta
        if self.same:
            x_BCHW = _padded(x_BCHW, self.kernel_size[0], self.stride[0])
        if delta is None:
            return super().forward(x_BCHW)
        if not self.reproducible:
            weight = self.weight + delta.to(self.weight.dtype)
            return F.conv2d(x_BCHW, weight, self.bias, self.stride, self.padding)
        assert not x_BCHW.requires_grad and isinstance(self.padding[0], int)
        result: Tensor = _RowByRow.apply(x_BCHW, self.weight, delta, self.bias, self.stride[0], self.padding[0])
        return result


def _padded(x_BCHW: Tensor, kernel: int, stride: int) -> Tensor:
    """Zeros around the images, so that ceil(side / stride) positions result."""
    edges: list[int] = []
    for side in (x_BCHW.shape[-1], x_BCHW.shape[-2]):
        missing = max(0, (-(-side // stride) - 1) * stride + kernel - side)
        edges += [missing // 2, missing - missing // 2]
    return F.pad(x_BCHW, edges)


class Perturbation:
    """Perturbation that is currently added to a stem's weight; copies of a stem share it."""

    delta: Tensor | None = None

    @contextmanager
    def of(self, delta: Tensor | None) -> Iterator[None]:
        """Add ``delta`` in every pass inside this block."""
        self.delta = delta
        try:
            yield
        finally:
            self.delta = None


class _RowByRow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BCHW: Tensor, weight: Tensor, delta: Tensor, bias: Tensor | None, stride: int, padding: int
    ) -> Tensor:
        ctx.save_for_backward(x_BCHW)
        ctx.stride, ctx.padding, ctx.shape, ctx.dtypes = stride, padding, weight.shape, (weight.dtype, delta.dtype)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.conv2d(x_BCHW, weight + delta.to(weight.dtype), bias, stride=stride, padding=padding)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        (x_BCHW,) = ctx.saved_tensors
        total = _weight_gradient(x_BCHW, outer[0], ctx.shape, ctx.stride, ctx.padding)
        bias = None if ctx.bias_dtype is None else outer[0].sum((0, 2, 3), dtype=torch.float64).to(ctx.bias_dtype)
        return None, *(total.to(dtype) for dtype in ctx.dtypes), bias, None, None


def _weight_gradient(x_BCHW: Tensor, outer_BOHW: Tensor, shape: torch.Size, stride: int, padding: int) -> Tensor:
    """Row by row, added in double precision."""
    dtype = torch.promote_types(x_BCHW.dtype, torch.float32)  # half precision would round the products' sums
    outer_BOP = outer_BOHW.flatten(2)
    rows = max(1, _COLUMNS_AT_ONCE // (shape[1:].numel() * outer_BOP.shape[2]))
    total = torch.zeros(shape, dtype=torch.float64, device=x_BCHW.device)
    for x, outer in zip(torch.split(x_BCHW, rows), torch.split(outer_BOP, rows), strict=True):
        columns_RDP = F.unfold(x.to(dtype), shape[2:], stride=stride, padding=padding)
        products_ROD = outer.to(dtype) @ columns_RDP.transpose(1, 2)
        total += products_ROD.sum(0, dtype=torch.float64).view(shape)
    return total
