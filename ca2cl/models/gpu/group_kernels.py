# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, disable-error-code="untyped-decorator, misc"
# Triton reads annotations, too, and takes those of constants alone.
"""Triton kernels of BatchNorm over groups.

A group is ``rows`` consecutive pixels of ``channels`` numbers, as channels_last has them. Statistics and sums are
fp32; a program takes ``chunk`` pixels of a group to two numbers a channel, ``parts`` (G, P, 2, C). Where a chunk
begins depends on the group alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(rows, channels, first, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channels, and where a tile of pixels from ``first`` on begins and lies, of the program's group."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    begin = (tl.program_id(2).to(tl.int64) * rows + first) * channels
    return c, begin, tl.arange(0, BLOCK_N)[:, None] * channels + c[None, :]


@triton.jit
def _store_pair(parts, channels, c, one, other):
    """Two numbers a channel of this program's chunk."""
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 2 * channels + c
    tl.store(parts + at, one, c < channels)
    tl.store(parts + at + channels, other, c < channels)


@triton.jit
def moments_kernel(x, parts, rows, channels, chunk, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """``parts`` = the mean and the sum of squared deviations of each chunk.

    Welford's update for each place of the tile, and Chan's sum over places.
    """
    first = tl.program_id(0) * chunk
    count = tl.minimum(chunk, rows - first)
    c, begin, at = _place(rows, channels, first, BLOCK_N, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_N):
        there = (start + n < count)[:, None] & (c < channels)[None, :]
        value = tl.load(x + begin + at, there, 0).to(tl.float32)
        change = tl.where(there, value - mean, 0.0)
        mean += change * (BLOCK_N * 1.0 / (start + BLOCK_N))
        squares += change * (value - mean)
        begin += BLOCK_N * channels
    number = ((count - n + (BLOCK_N - 1)) // BLOCK_N).to(tl.float32)[:, None]
    total = tl.sum(mean * (number / count), 0)
    apart = mean - total[None, :]
    _store_pair(parts, channels, c, total, tl.sum(squares + number * apart * apart, 0))


@triton.jit
def statistics_kernel(
    parts, out, rows, channels, chunk, chunks, share, unbiased_share, eps,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out`` (3, G, C) = mean, 1 / deviation and unbiased variance; ``share`` = 1 / rows."""
    group = tl.program_id(0).to(tl.int64)
    c, p = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    there = (p < chunks)[:, None] & (c < channels)[None, :]
    at = parts + (group * chunks + p)[:, None] * 2 * channels + c[None, :]
    means, squares = tl.load(at, there, 0.0), tl.load(at + channels, there, 0.0)
    number = tl.maximum(tl.minimum(rows - p * chunk, chunk), 0).to(tl.float32)[:, None]
    mean = tl.sum(means * (number * share), 0)
    apart = means - mean[None, :]
    total = tl.sum(squares + number * apart * apart, 0)
    to, step = out + group * channels + c, tl.num_programs(0) * channels
    tl.store(to, mean, c < channels)
    tl.store(to + step, tl.rsqrt(total * share + eps), c < channels)
    tl.store(to + 2 * step, total * unbiased_share, c < channels)


@triton.jit
def _unit(statistics, channels, c):
    """Mean and 1 / deviation of the program's group."""
    at = statistics + tl.program_id(2) * channels + c
    mean = tl.load(at, c < channels, 0.0)
    return mean[None, :], tl.load(at + tl.num_programs(2) * channels, c < channels, 0.0)[None, :]


@triton.jit
def normalize_kernel(
    x, statistics, weight, bias, out, rows, channels,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out`` = w u + b of u = (x - mean) / deviation."""
    first = tl.program_id(0) * BLOCK_N
    c, begin, at = _place(rows, channels, first, BLOCK_N, BLOCK_C)
    there = (first + tl.arange(0, BLOCK_N) < rows)[:, None] & (c < channels)[None, :]
    mean, scale = _unit(statistics, channels, c)
    w, b = tl.load(weight + c, c < channels, 0.0)[None, :], tl.load(bias + c, c < channels, 0.0)[None, :]
    value = tl.load(x + begin + at, there, 0).to(tl.float32)
    value = (value - mean) * (scale * w) + b
    tl.store(out + begin + at, value.to(out.dtype.element_ty), there)


@triton.jit
def gradient_sums_kernel(
    grad, x, statistics, parts, rows, channels, chunk,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``parts`` = the sums of g and of g u over each chunk."""
    first = tl.program_id(0) * chunk
    count = tl.minimum(chunk, rows - first)
    c, begin, at = _place(rows, channels, first, BLOCK_N, BLOCK_C)
    n = tl.arange(0, BLOCK_N)
    mean, scale = _unit(statistics, channels, c)
    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, count, BLOCK_N):
        there = (start + n < count)[:, None] & (c < channels)[None, :]
        g = tl.load(grad + begin + at, there, 0).to(tl.float32)
        value = tl.load(x + begin + at, there, 0).to(tl.float32)
        sums += g
        products += g * (value - mean)
        begin += BLOCK_N * channels
    _store_pair(parts, channels, c, tl.sum(sums, 0), tl.sum(products * scale, 0))


@triton.jit
def input_gradient_kernel(
    grad, x, statistics, weight, sums, out, rows, channels, share,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """``out`` = w [g - mean(g) - u mean(g u)] / deviation; ``sums`` (G, 2, C) of g and g u, ``share`` = 1 / rows."""
    first = tl.program_id(0) * BLOCK_N
    c, begin, at = _place(rows, channels, first, BLOCK_N, BLOCK_C)
    there = (first + tl.arange(0, BLOCK_N) < rows)[:, None] & (c < channels)[None, :]
    mean, scale = _unit(statistics, channels, c)
    w = tl.load(weight + c, c < channels, 0.0)[None, :]
    its = sums + tl.program_id(2) * 2 * channels + c
    mean_g = tl.load(its, c < channels, 0.0)[None, :] * share
    mean_gu = tl.load(its + channels, c < channels, 0.0)[None, :] * share
    g = tl.load(grad + begin + at, there, 0).to(tl.float32)
    unit = (tl.load(x + begin + at, there, 0).to(tl.float32) - mean) * scale
    value = (g - mean_g - unit * mean_gu) * (scale * w)
    tl.store(out + begin + at, value.to(out.dtype.element_ty), there)
