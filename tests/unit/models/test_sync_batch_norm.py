"""Synchronised and grouped BatchNorm against the formulas, on one process (several: tests/jobs/pretrain)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ca2cl.models.batch_norm import BatchNorm, recording
from ca2cl.models.group_batch_norm import group_batch_norm
from ca2cl.models.sync_batch_norm import reproducible_batch_norm, sync_batch_norm

EPS = 1e-5
Normalize = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Tensor]]
FORMS = pytest.mark.parametrize("normalize", [sync_batch_norm, reproducible_batch_norm])


def case(dtype: torch.dtype, offset: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, weight, bias and the gradient of the output."""
    generator = torch.Generator().manual_seed(5)
    shape = (6, 4, 5, 3)
    x = (torch.randn(shape, generator=generator) * 2 + offset).contiguous(memory_format=torch.channels_last)
    outer = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.rand(4, generator=generator) + 0.5, torch.randn(4, generator=generator)
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), weight.to(parameters), bias.to(parameters), outer.to(dtype)


def by_the_formula(x: Tensor, weight: Tensor, bias: Tensor, outer: Tensor) -> list[Tensor]:
    """Output, mean, unbiased variance, and the gradients of x, weight and bias, a channel after another in double."""
    x, weight, bias, outer = (part.double() for part in (x, weight, bias, outer))
    out, grad_x = torch.empty_like(x), torch.empty_like(x)
    rest: dict[str, list[Tensor]] = {"mean": [], "variance": [], "weight": [], "bias": []}
    for c in range(x.shape[1]):
        values, grads = x[:, c], outer[:, c]
        mean, variance = values.mean(), values.var(correction=0)
        unit = (values - mean) / (variance + EPS).sqrt()
        out[:, c] = weight[c] * unit + bias[c]
        slope = weight[c] / (variance + EPS).sqrt()
        grad_x[:, c] = slope * (grads - grads.mean() - unit * (grads * unit).mean())
        found = (mean, values.var(correction=1), (grads * unit).sum(), grads.sum())
        for name, value in zip(rest, found, strict=True):
            rest[name].append(value)
    mean_C, variance_C, weight_C, bias_C = (torch.stack(values) for values in rest.values())
    return [out, mean_C, variance_C, grad_x, weight_C, bias_C]


def found_by(normalize: Normalize, x: Tensor, weight: Tensor, bias: Tensor, outer: Tensor) -> list[Tensor]:
    leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
    out, mean_C, variance_C = normalize(*leaves, EPS)
    gradients = torch.autograd.grad(out, leaves, outer)
    assert out.dtype == gradients[0].dtype == x.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    return [out, mean_C, variance_C, *gradients]


@FORMS
@pytest.mark.parametrize(
    ("dtype", "offset", "tolerance"),
    [
        (torch.float64, 1.0, 1e-12),
        (torch.float32, 1.0, 2e-6),
        (torch.float32, 300.0, 2e-3),  # rounding of x itself, 300 * 2^-24, is 1e-5 of its deviation
        (torch.bfloat16, 1.0, 2e-2),
    ],
)
def test_output_statistics_and_gradients_are_the_formulas(
    normalize: Normalize, dtype: torch.dtype, offset: float, tolerance: float
) -> None:
    given = case(dtype, offset)
    for ours, true in zip(found_by(normalize, *given), by_the_formula(*given), strict=True):
        assert (ours.double() - true).abs().max() <= tolerance * true.abs().max().clamp(min=1.0)


@FORMS
def test_gradients_are_those_of_finite_differences(normalize: Normalize) -> None:
    x, weight, bias, _ = case(torch.float64)
    leaves = [part.requires_grad_() for part in (x[:3, :2].contiguous(), weight[:2].clone(), bias[:2].clone())]
    assert torch.autograd.gradcheck(lambda *args: normalize(*args, EPS)[0], leaves)


def test_half_precision_keeps_statistics_in_single() -> None:
    """A mean in bfloat16 would be off by 2^-9, as much for every tile of the batch."""
    x, weight, bias, _ = case(torch.bfloat16, offset=3.0)
    _, mean_C, _ = sync_batch_norm(x, weight, bias, EPS)
    assert mean_C.dtype == torch.float32
    torch.testing.assert_close(mean_C, x.float().mean((0, 2, 3)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_groups_side_by_side_are_groups_one_by_one(groups: int) -> None:
    """What a GPU runs against what a CPU runs."""
    size = 6 // groups
    layer = BatchNorm(4, "lane_group", size).train()
    x, weight, bias, outer = case(torch.float32)
    layer.weight.data, layer.bias.data = weight, bias
    with recording(layer, 0):
        one_by_one = layer(x.requires_grad_())
    side_by_side, mean_GC, var_GC = group_batch_norm(x, layer.weight, layer.bias, size, EPS)
    assert torch.equal(one_by_one, side_by_side) and side_by_side.is_contiguous(memory_format=torch.channels_last)
    ((recorded, number),) = layer.take_recorded()
    assert number == len(mean_GC) == groups
    torch.testing.assert_close(recorded, torch.cat([mean_GC, var_GC], 1).sum(0, dtype=torch.float64))
    leaves = [x, layer.weight, layer.bias]
    ours, theirs = (torch.autograd.grad(out.relu_(), leaves, outer) for out in (side_by_side, one_by_one))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
