"""Check whether a device computes in a half precision natively."""

from __future__ import annotations

import logging
import statistics
import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ca2cl.errors import InputError

logger = logging.getLogger(__name__)
EMULATED = 1.2
"""A half precision that takes more than this many times as long as fp32 is emulated."""
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_precision(precision: str, device: torch.device, setting: str) -> None:
    """Warn of a half precision that is slower than fp32 on a CPU, and refuse fp16 there: it would gain nothing, and its
    loss scaling may skip steps.

    Args:
        setting: what sets it, such as run.precision.

    Raises:
        InputError: fp16 on a CPU that has none.
    """
    if device.type != "cpu" or precision not in HALF or _has(precision):
        return
    ratio = slowdown(device, HALF[precision])
    fault = f"{setting} is {precision}, which this CPU emulates: a convolution takes {ratio:.1f} of fp32's time"
    if precision == "fp16":
        raise InputError(f"{fault}; use --{setting} no")
    if ratio > EMULATED:
        logger.warning("%s; --%s no is faster", fault, setting)


def _has(precision: str) -> bool:
    """True if torch's CPU kernels compute in it. The CPU's flags decide: a measurement varies with its other load."""
    known = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    return known is None or bool(known())


def slowdown(device: torch.device, kind: torch.dtype) -> float:
    """The time of a convolution of the encoder, forward and backward, over fp32's.

    Raises:
        RuntimeError: the device cannot do it.
    """
    return _convolution_seconds(device, kind) / _convolution_seconds(device, torch.float32)


def _convolution_seconds(device: torch.device, kind: torch.dtype) -> float:
    x = torch.randn(16, 64, 16, 16, device=device, dtype=kind).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=device, dtype=kind, requires_grad=True)

    def once() -> None:
        result: Tensor = F.conv2d(x, weight, padding=1)
        result.float().sum().backward()  # type: ignore[no-untyped-call]
        if device.type == "cuda":
            torch.cuda.synchronize()

    return seconds_of(once)


def seconds_of(once: Callable[[], object], repeats: int = 3) -> float:
    """Median of the times of a call, after one that warms up."""
    once()
    return statistics.median(timeit.repeat(once, number=1, repeat=repeats))
