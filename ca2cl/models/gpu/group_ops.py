"""Triton kernels of BatchNorm over groups as torch operators, one launch each.

Each operator also knows the shape of its result, for tensors without data. Triton is imported by the first launch.

Activations (B, C, H, W) are fp32, fp16 or bf16 and channels_last; all else is fp32.

Shapes: G groups of s rows, P chunks of a group's s H W pixels, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

_TILE = 2048  # numbers that a program holds at a time
_MOST_CHUNKS = 256
_LEAST_CHUNK = 512  # pixels: the sum at a chunk's end costs as much as some tiles


def _kernels() -> Any:
    from ca2cl.models.gpu import group_kernels

    return group_kernels


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _pixels(x_BCHW: Tensor, group: int) -> int:
    return group * x_BCHW.shape[2] * x_BCHW.shape[3]


def _chunk(pixels: int) -> int:
    """Pixels of a chunk: a group's own number decides, so that its sums are the same beside any other groups."""
    return max(_LEAST_CHUNK, -(-pixels // _MOST_CHUNKS))


def _tile(channels: int) -> dict[str, int]:
    block = min(64, _power_of_two(channels))
    return {"BLOCK_C": block, "BLOCK_N": _TILE // block}


def _launch(kernel: str, x_BCHW: Tensor, group: int, chunk: int | None, *args: Any) -> None:
    """One program for each chunk (or, without one, each tile), block of channels and group."""
    channels, tile = x_BCHW.shape[1], _tile(x_BCHW.shape[1])
    pixels = _pixels(x_BCHW, group)
    grid = -(-pixels // (chunk or tile["BLOCK_N"])), -(-channels // tile["BLOCK_C"]), len(x_BCHW) // group
    getattr(_kernels(), kernel)[grid](*args, **tile)


def _parts(x_BCHW: Tensor, group: int) -> Tensor:
    pixels = _pixels(x_BCHW, group)
    shape = len(x_BCHW) // group, -(-pixels // _chunk(pixels)), 2, x_BCHW.shape[1]
    return x_BCHW.new_empty(shape, dtype=torch.float32)


@custom_op("ca2cl::group_norm_moments", mutates_args=())
def moments(x_BCHW: Tensor, group: int) -> Tensor:
    """Mean and sum of squared deviations of each chunk (G, P, 2, C)."""
    parts, pixels = _parts(x_BCHW, group), _pixels(x_BCHW, group)
    chunk = _chunk(pixels)
    _launch("moments_kernel", x_BCHW, group, chunk, x_BCHW, parts, pixels, x_BCHW.shape[1], chunk)
    return parts


@custom_op("ca2cl::group_norm_statistics", mutates_args=())
def statistics(parts_GP2C: Tensor, pixels: int, eps: float) -> Tensor:
    """Mean, 1 / deviation and unbiased variance (3, G, C) of groups of that many pixels."""
    groups, chunks, _, channels = parts_GP2C.shape
    out = parts_GP2C.new_empty(3, groups, channels)
    unbiased_share = 1 / (pixels - 1) if pixels > 1 else float("nan")
    block = 16
    _kernels().statistics_kernel[groups, -(-channels // block)](
        parts_GP2C, out, pixels, channels, _chunk(pixels), chunks, 1 / pixels, unbiased_share, eps,
        BLOCK_P=_power_of_two(chunks), BLOCK_C=block,
    )  # fmt: skip
    return out


@statistics.register_fake
def _(parts_GP2C: Tensor, pixels: int, eps: float) -> Tensor:
    groups, _, _, channels = parts_GP2C.shape
    return parts_GP2C.new_empty(3, groups, channels)


@custom_op("ca2cl::group_norm_normalize", mutates_args=())
def normalize(x_BCHW: Tensor, statistics_3GC: Tensor, weight_C: Tensor, bias_C: Tensor, group: int) -> Tensor:
    """The normalised rows, in the precision of ``x_BCHW``."""
    out = torch.empty_like(x_BCHW)
    sizes = _pixels(x_BCHW, group), x_BCHW.shape[1]
    _launch("normalize_kernel", x_BCHW, group, None, x_BCHW, statistics_3GC, weight_C, bias_C, out, *sizes)
    return out


@custom_op("ca2cl::group_norm_gradient_sums", mutates_args=())
def gradient_sums(grad_BCHW: Tensor, x_BCHW: Tensor, statistics_3GC: Tensor, group: int) -> Tensor:
    """Sums of g and of g u over each chunk (G, P, 2, C)."""
    parts, pixels = _parts(x_BCHW, group), _pixels(x_BCHW, group)
    args = grad_BCHW, x_BCHW, statistics_3GC, parts, pixels, x_BCHW.shape[1], _chunk(pixels)
    _launch("gradient_sums_kernel", x_BCHW, group, _chunk(pixels), *args)
    return parts


@custom_op("ca2cl::group_norm_input_gradient", mutates_args=())
def input_gradient(
    grad_BCHW: Tensor, x_BCHW: Tensor, statistics_3GC: Tensor, weight_C: Tensor, sums_G2C: Tensor, group: int
) -> Tensor:
    """w [g - mean(g) - u mean(g u)] / deviation, in the precision of ``x_BCHW``."""
    out, pixels = torch.empty_like(x_BCHW), _pixels(x_BCHW, group)
    args = grad_BCHW, x_BCHW, statistics_3GC, weight_C, sums_G2C, out, pixels, x_BCHW.shape[1], 1 / pixels
    _launch("input_gradient_kernel", x_BCHW, group, None, *args)
    return out


@moments.register_fake
def _(x_BCHW: Tensor, group: int) -> Tensor:
    return _parts(x_BCHW, group)


@gradient_sums.register_fake
def _(grad_BCHW: Tensor, x_BCHW: Tensor, statistics_3GC: Tensor, group: int) -> Tensor:
    return _parts(x_BCHW, group)


@normalize.register_fake
def _(x_BCHW: Tensor, statistics_3GC: Tensor, weight_C: Tensor, bias_C: Tensor, group: int) -> Tensor:
    return torch.empty_like(x_BCHW)


@input_gradient.register_fake
def _(
    grad_BCHW: Tensor, x_BCHW: Tensor, statistics_3GC: Tensor, weight_C: Tensor, sums_G2C: Tensor, group: int
) -> Tensor:
    return torch.empty_like(x_BCHW)
