"""The GPU's renderer where there is no GPU: its kernels interpreted, compiled for two cards, and counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ca2cl.config import IMAGENET_MEAN, IMAGENET_STD, ViewsConfig
from ca2cl.views.build import build_views
from tests.support.fake_gpu import fake_cuda

triton = pytest.importorskip("triton", reason="comes with torch for CUDA")
SIGNATURES = {
    "read_kernel": (
        "*u8 *fp32 *u8 *i32 i32 i32 i32", ({"BLOCK": 512, "STAINS": True}, {"BLOCK": 512, "STAINS": False})
    ),
    "weak_kernel": ("*u8 *fp32 *fp32 *bf16 i32 i32 i32", ({"BLOCK": 512},)),
    "across_kernel": ("*u8 *fp32 *i32 *u8 i32 i32", ({"BLOCK": 512, "BLOCKS": 128, "COLOURS": True},)),
    "near_kernel": (
        "*u8 *fp32 *fp32 {} i32", ({"BLOCK": 512, "GAUSSIAN_ONLY": True}, {"BLOCK": 512, "GAUSSIAN_ONLY": False})
    ),
    "tables_kernel": ("*u8 *fp32 *fp32 *u8 i32 i32", ({"BLOCK": 1024},)),
    "finish_kernel": ("*u8 *fp32 *u8 *fp32 *fp16 i32 i32", ({"BLOCK": 512},)),
}  # fmt: skip


def test_interpreted_kernels_make_what_the_cpu_makes() -> None:
    command = [sys.executable, "-m", "tests.support.interpreted", "crop 32 70 64 3", "ca2cl 32 70 64 3"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for clip, _, furthest, beyond_one, mean in json.loads(done.stdout):
        assert furthest <= (8 if clip else 3) and beyond_one < 0.02 and mean < 0.2


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", SIGNATURES)
def test_kernels_compile(name: str, capability: int) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ca2cl.views.gpu import kernels

    types, settings = SIGNATURES[name]
    for constants in settings:
        written = types.format("*bf16" if constants.get("GAUSSIAN_ONLY") else "*u8").split()
        kernel = getattr(kernels, name)
        signature = dict(zip(kernel.arg_names, written + ["constexpr"] * len(constants), strict=True))
        source = ASTSource(kernel, signature, constants)  # whose name differs between versions
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert len(made.asm["cubin"]) > 1000


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Launches, copies from the host, and bytes read and written, each tensor of an operation once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches = self.copies = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        if on_gpu and func.namespace == "ca2cl":
            self.launches += 1
            self.bytes += sum(tensor.nbytes for tensor in on_gpu)
        elif on_gpu and len(on_gpu) < len(tensors):
            self.copies += 1
        elif on_gpu:
            assert func.is_view or "empty" in func.name() or func.namespace == "prim", func.name()
        return out


@pytest.mark.parametrize("recipe", ["ca2cl", "crop"])
def test_a_batch_of_the_papers_takes_few_launches_and_one_copy(recipe: str) -> None:
    config, count = ViewsConfig(recipe=recipe), 1792  # type: ignore[arg-type]
    views = build_views(config, 224, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, dtype=torch.bfloat16)
    with fake_cuda() as gpu:
        tiles = torch.empty((count, 224, 224, 3), dtype=torch.uint8, device=gpu)
        with _Count() as counted:
            made = views(tiles, torch.arange(count), 0)
    assert {view.dtype for view in made} == {torch.bfloat16} and made[0].device == tiles.device
    assert counted.launches <= 6 and counted.copies == 1 and counted.bytes < 4.5e9
