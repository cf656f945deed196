"""Two GPUs of which there is only the shape: what runs on them computes nothing, but devices must agree as on a real
one, and whatever asks for a number that lies there fails. What is copied to the host is zeros there.

``fake_cuda`` is torch's own imitation of a CUDA device, for forward passes: the autograd engine wants a driver.
``strict_meta`` is torch's meta device, on which a backward pass runs; its kernels let many a mixture of devices pass,
so that every operation's tensors are looked at here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
META = torch.device("meta")
# Copies, and indexing by indices on the CPU, which CUDA allows.
_MAY_MIX = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put", "aten::index_put_")


class _FakeCuda(FakeTensorMode):
    """Fake tensors for what touches the GPU only: those of the CPU are real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "pin_memory" in func.name():  # needs a driver
            return args[0].clone()
        if _reads(func, args, kwargs):
            return _zeros(args[0], kwargs)
        if any(_on_cuda(leaf) for leaf in tree_leaves((args, kwargs))):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **kwargs)


def _on_cuda(leaf: object) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _reads(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation copies from a GPU to the host. (In inference mode it is ``to`` that comes here.)"""
    if func.overloadpacket not in (torch.ops.aten._to_copy, torch.ops.aten.to):
        return False
    devices = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.device)]
    return args[0].device.type != "cpu" and any(device.type == "cpu" for device in devices)


def _zeros(like: Tensor, kwargs: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=kwargs.get("dtype") or like.dtype)


class _StrictMeta(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A number on the CPU, a tensor without dimensions, goes with tensors of any device.
        devices = {x.device for x in tensors if x.device.type != "cpu" or x.ndim > 0}
        if len(devices) > 1 and func.name() not in _MAY_MIX:
            raise RuntimeError(f"{func.name()} of tensors on {sorted(map(str, devices))}: not on the same device")
        if _reads(func, args, kwargs):
            return _zeros(args[0], kwargs)
        return func(*args, **kwargs)


@contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """A CUDA device. Tables that views keep for it are forgotten afterwards."""
    try:
        with _FakeCuda(allow_non_fake_inputs=True):
            yield CUDA
    finally:
        for name, module in list(sys.modules.items()):
            if name.startswith("ca2cl."):
                for kept in vars(module).values():
                    if hasattr(kept, "cache_clear"):
                        kept.cache_clear()


@contextmanager
def strict_meta() -> Iterator[torch.device]:
    """A device for backward passes."""
    autocast = torch.autocast

    def of_cpu(kind: str, *args: Any, **kwargs: Any) -> torch.autocast:  # there is none of the meta device
        return autocast("cpu" if kind == "meta" else kind, *args, **kwargs)

    with patch("torch.autocast", of_cpu), _StrictMeta():
        yield META
