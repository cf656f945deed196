"""Compare a step's estimated memory with what there is."""

from __future__ import annotations

import logging
import math
import textwrap
from collections.abc import Callable

import torch

from ca2cl.errors import InputError
from ca2cl.pretrain.memory.machine import free_bytes
from ca2cl.runtime.launched import find_place, launched_rank

logger = logging.getLogger(__name__)
_WIDTH = 79
SURE, LIKELY = 0.85, 1.3
"""A step takes at least so much of the quick estimate, and may take so much."""


def check_memory(
    step_of: Callable[[int], float],
    micro_batch: int,
    share: int,
    device: torch.device,
    held: float = 0.0,
    limit: float = math.inf,
    *,
    sharded: bool = False,
) -> None:
    """Log a step's memory, warn if it may not fit, and refuse it if it cannot.

    Args:
        step_of: bytes of a step (``activations.StepMemory``) by the tiles that a process holds at a time.
        micro_batch: tiles that a process holds at a time.
        share: its tiles of a batch.
        device: where this process computes.
        held: bytes of its weights, gradients and optimizer state.
        limit: bytes that it may use of what is free, as ``limit_left`` said before the estimate was made.
        sharded: the engine is.

    Raises:
        InputError: it cannot fit.
    """
    processes = find_place().local_world if device.type == "cpu" else 1
    step, free = step_of(micro_batch), min(free_bytes(device) / processes, limit)
    there = f"{_size(free)} are free{' for each process' if processes > 1 else ''}"
    if SURE * held > free:
        remedy = "more processes" if sharded else "several processes and --run.fsdp true, or --optim.name sgd"
        raise InputError(
            f"model.arch needs about {_size(held)} of {'GPU ' if device.type == 'cuda' else ''}memory for weights, "
            f"gradients and optimizer state; {there}; use a smaller one, or {remedy}"
        )
    free -= SURE * held
    estimate = (
        f"a step holds about {_size(step)} of {'GPU ' if device.type == 'cuda' else ''}memory, for "
        f"{micro_batch} tiles at a time, beside {_size(held)} of weights, "
        f"gradients and optimizer state{'' if device.type == 'cuda' else ', and the program itself'}; {there}"
    )
    sizes = (size for size in range(2, min(micro_batch, share + 1)) if share % size == 0)
    smaller = max((size for size in sizes if LIKELY * step_of(size) <= free), default=0)
    remedy = "use a smaller --run.batch_size or --data.image_size, or more processes"
    if smaller:
        remedy = f"use --run.micro_batch_size {smaller} or less (with --model.norm lane_group), or more processes"
    if SURE * step > free:
        whole = ", a process's whole share of the batch" if micro_batch == share else ""
        raise InputError(f"run.micro_batch_size is {micro_batch}{whole}: {estimate}; {remedy}")
    if LIKELY * step > free:
        logger.warning("%s, which may not be enough: %s", estimate, remedy)
    elif launched_rank() == 0:
        logger.info(textwrap.fill(estimate, _WIDTH))


def check_teacher(weights: float, device: torch.device) -> None:
    """Refuse a teacher whose weights do not fit a device, before they are moved there.

    Args:
        weights: their bytes.
        device: where the teacher computes.

    Raises:
        InputError: they do not fit.
    """
    free = free_bytes(device)
    if weights > free:
        raise InputError(
            f"method.options has a teacher of {_size(weights)}; {_size(free)} of memory are free; use a smaller one, "
            "or --method.options cache=FOLDER, which computes its features beforehand"
        )


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
