"""Compare a step's estimated memory with what there is."""

from __future__ import annotations

import logging
import math

import torch

from ca2cl.errors import InputError
from ca2cl.pretrain.memory.machine import free_bytes
from ca2cl.runtime.launched import find_place, launched_rank

logger = logging.getLogger(__name__)
_SURE, _LIKELY = 0.9, 1.6
"""A step takes at least so much of the estimate, and often so much: a ResNet-18's at 96 px takes 1.5 on a CPU."""


def check_memory(
    a_tile: float,
    graphs: int,
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
        a_tile: of ``bytes_a_tile``.
        graphs: passes of a micro-batch whose graphs a step holds at a time (``Method.graphs``).
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
    step, free = graphs * micro_batch * a_tile, min(free_bytes(device) / processes, limit)
    there = f"{_size(free)} are free{' for each process' if processes > 1 else ''}"
    if _SURE * held > free:
        remedy = "more processes" if sharded else "several processes and --run.fsdp true, or --optim.name sgd"
        raise InputError(
            f"model.arch needs about {_size(held)} of {'GPU ' if device.type == 'cuda' else ''}memory for weights, "
            f"gradients and optimizer state; {there}; use a smaller one, or {remedy}"
        )
    free -= _SURE * held
    estimate = (
        f"a step holds about {_size(step)} of {'GPU ' if device.type == 'cuda' else ''}memory, for "
        f"{graphs} pass{'es' * (graphs > 1)} of {micro_batch} tiles at a time, beside {_size(held)} of weights, "
        f"gradients and optimizer state; {there}"
    )
    fits = int(free / _LIKELY / graphs / a_tile)
    smaller = max((size for size in range(2, min(fits, share) + 1) if share % size == 0), default=0)
    remedy = "use a smaller --run.batch_size or --data.image_size, or more processes"
    if smaller:
        remedy = f"use --run.micro_batch_size {smaller} or less (with --model.norm lane_group), or more processes"
    if _SURE * step > free:
        whole = ", a process's whole share of the batch" if micro_batch == share else ""
        raise InputError(f"run.micro_batch_size is {micro_batch}{whole}: {estimate}; {remedy}")
    if _LIKELY * step > free:
        logger.warning("%s, which may not be enough: %s", estimate, remedy)
    elif launched_rank() == 0:
        logger.info(estimate)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
