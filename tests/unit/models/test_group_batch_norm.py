"""The GPU's BatchNorm over groups where there is no GPU: its kernels interpreted, compiled for two cards, and faked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ca2cl.models import group_batch_norm as module
from ca2cl.models.batch_norm import BatchNorm, recording
from tests.support.fake_gpu import fake_cuda
from tests.unit.models.test_sync_batch_norm import EPS, by_the_formula

CASES = {
    "odd sizes": ((6, 5, 5, 3), 2, torch.float32, 1.0, 2e-6),
    "one channel": ((4, 1, 3, 3), 2, torch.float32, 1.0, 2e-6),
    "two blocks of channels": ((4, 70, 3, 5), 2, torch.float32, 1.0, 2e-6),
    "two chunks of many tiles": ((4, 66, 14, 25), 2, torch.float32, 1.0, 2e-6),
    "three chunks": ((4, 3, 23, 25), 2, torch.float32, 1.0, 2e-6),
    "one pixel a row": ((6, 5, 1, 1), 3, torch.float32, 1.0, 2e-6),
    "one pixel a group": ((2, 5, 1, 1), 1, torch.float32, 1.0, 2e-6),
    "far from 0": ((4, 3, 23, 25), 2, torch.float32, 300.0, 1e-4),  # rounding of x itself is 1e-5 of its deviation
    "bfloat16": ((4, 3, 23, 25), 2, torch.bfloat16, 1.0, 1e-2),
    "half": ((4, 5, 5, 3), 2, torch.float16, 1.0, 2e-3),
}
Case = tuple[Tensor, Tensor, Tensor, Tensor, int, float]


def _case(shape: tuple[int, ...], group: int, dtype: torch.dtype, offset: float) -> Case:
    generator = torch.Generator().manual_seed(3)
    x, outer = torch.randn(2, *shape, generator=generator).unbind()
    x = (2 * x + offset).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, shape[1], generator=generator).unbind()
    return x, weight, bias, outer.to(dtype), group, EPS  # a gradient may have another layout


def _one_by_one(x: Tensor, weight: Tensor, bias: Tensor, outer: Tensor, group: int, eps: float) -> list[Tensor]:
    """Output, means, unbiased variances, and the gradients of x, weight and bias, a group after another in double."""
    assert eps == EPS
    pairs = zip(x.split(group), outer.split(group), strict=True)
    out, mean, variance, grad_x, grad_weight, grad_bias = zip(
        *(by_the_formula(rows, weight, bias, grads) for rows, grads in pairs), strict=True
    )
    return [
        torch.cat(out), torch.stack(mean), torch.stack(variance), torch.cat(grad_x), sum(grad_weight), sum(grad_bias)
    ]  # type: ignore[list-item]  # fmt: skip


def _interpreted(cases: list[Case], folder: Path) -> list[list[Tensor]]:
    torch.save(cases, folder / "cases.pt")
    command = [sys.executable, "-m", "tests.support.interpreted_groups", folder / "cases.pt", folder / "made.pt"]
    subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
    made: list[list[Tensor]] = torch.load(folder / "made.pt", weights_only=True)
    return made


@pytest.mark.filterwarnings("ignore:var")  # of the formula, for one pixel
def test_interpreted_kernels_are_the_formulas_group_by_group(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA")
    cases = {name: _case(*case) for name, (*case, _) in CASES.items()}
    x, weight, bias, outer, group, _ = cases["two chunks of many tiles"]
    alone = (x[group:], weight, bias, outer[group:], group, EPS)
    *made, by_itself = _interpreted([*cases.values(), alone], tmp_path)
    results = dict(zip(cases, made, strict=True))
    for name, case in cases.items():
        for ours, true in zip(results[name], _one_by_one(*case), strict=True):
            bound = CASES[name][-1] * true.nan_to_num().abs().max().clamp(min=1.0)
            torch.testing.assert_close(ours.double(), true, rtol=0, atol=float(bound), equal_nan=True, msg=name)
        out, mean, _, grad_x, *_ = results[name]
        assert out.dtype == grad_x.dtype == case[0].dtype and mean.dtype == torch.float32
        assert out.is_contiguous(memory_format=torch.channels_last)
    beside = results["two chunks of many tiles"]
    for number in (0, 3):  # to the last bit the same beside other groups, as on any number of processes
        assert torch.equal(by_itself[number], beside[number][group:])


_SIZES = {"BLOCK_N": 32, "BLOCK_C": 64}
SIGNATURES = {
    "moments_kernel": ("*{} *fp32 i32 i32 i32", _SIZES),
    "statistics_kernel": ("*fp32 *fp32 i32 i32 i32 i32 fp32 fp32 fp32", {"BLOCK_P": 256, "BLOCK_C": 16}),
    "normalize_kernel": ("*{} *fp32 *fp32 *fp32 *{} i32 i32", _SIZES),
    "gradient_sums_kernel": ("*{} *{} *fp32 *fp32 i32 i32 i32", _SIZES),
    "input_gradient_kernel": ("*{} *{} *fp32 *fp32 *fp32 *{} i32 i32 fp32", _SIZES),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile(name: str, capability: int) -> None:
    triton = pytest.importorskip("triton", reason="comes with torch for CUDA")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ca2cl.models.gpu import group_kernels

    types, constants = SIGNATURES[name]
    kernel = getattr(group_kernels, name)
    written = types.replace("{}", "bf16").split() + ["constexpr"] * len(constants)
    source = ASTSource(kernel, dict(zip(kernel.arg_names, written, strict=True)), constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert len(made.asm["cubin"]) > 1000


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_gpu_uses_the_kernels_where_they_apply(
    kernels: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_HAS_TRITON", kernels)
    used = []
    statistics = module.group_ops.statistics
    monkeypatch.setattr(module.group_ops, "statistics", lambda *args: used.append(1) or statistics(*args))
    layer = BatchNorm(8, "lane_group", 2).train()
    with fake_cuda() as gpu, recording(layer, 0), torch.no_grad():
        layer.to(gpu)
        x = torch.empty(6, 8, 5, 3, device=gpu, dtype=torch.bfloat16).contiguous(memory_format=layout)
        out = layer(x)
        assert out.shape == x.shape and out.dtype == x.dtype and out.device == x.device
        assert out.is_contiguous(memory_format=torch.channels_last)
        ((recorded, number),) = layer.take_recorded()
        assert recorded.shape == (16,) and number == 3
    assert len(used) == (kernels and layout == torch.channels_last)
