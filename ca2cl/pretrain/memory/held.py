"""Memory that weights, gradients and optimizer state take of each process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from ca2cl.models.backbone import Backbone, outline
from ca2cl.training.fsdp import blocks

Sharing = Literal["ddp", "zero1", "zero2", "fsdp"]
_NUMBER = 4
"""Bytes of an fp32 number, which every precision keeps."""
_MOMENTS = {"adam": 2, "adamw": 2, "sgd": 1, "sgd_plain": 1, "lars": 1}
_GATHERED = 2
"""Blocks whose weights, and gradients, are whole at a time: one is computed while the next is fetched."""


def held_bytes(
    build: Callable[[Backbone], nn.Module],
    arch: str,
    image_size: int,
    optimizer: str,
    sharing: Sharing,
    processes: int,
    *,
    averaged: bool = False,
    copies: int = 0,
) -> float:
    """Bytes of a process for weights, gradients, optimizer state and a moving average of the weights.

    Args:
        build: of the method, the network around an encoder.
        arch: of the encoder.
        image_size: side of the tile in pixels.
        optimizer: ``optim.name``.
        sharing: what the engine shares among the processes.
        processes: how many share it.
        averaged: whether there is an average (``optim.ema``), whole but under FSDP2.
        copies: half-precision copies of all weights: autocast keeps one in each graph, for its backward pass.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        network = build(outline(arch, "frozen", image_size=image_size))
    weights = _NUMBER * _numbers(network)
    moments, average, halves = _MOMENTS[optimizer] * weights, averaged * weights, copies * weights / 2
    if sharing == "ddp":
        return 2 * weights + moments + average + halves
    if sharing == "fsdp":
        largest = max((_NUMBER * _numbers(block) for block in blocks(network)), default=weights)
        return (2 * weights + moments + average) / processes + 2 * _GATHERED * largest + halves
    shards = weights + moments  # ZeRO updates a copy of the weights
    whole = average + halves + (2 * weights if sharing == "zero1" else weights)
    return whole + (shards if sharing == "zero1" else shards + weights) / processes


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
