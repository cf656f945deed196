"""Memory of weights, gradients and optimizer state by engine.

Weights are fp32 under every engine and precision: autocast rounds copies of them (``runtime.accelerator``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from ca2cl.config import OptimConfig
from ca2cl.training.deepspeed import BUCKET
from ca2cl.training.fsdp import blocks
from ca2cl.training.optim import build_optimizer

Sharing = Literal["ddp", "zero1", "zero2", "fsdp"]
"""What an engine shares among the processes: nothing, optimizer state, gradients too, weights too."""
_NUMBER = 4
_GATHERED = 2
"""Blocks whose weights, and gradients, are whole at a time under FSDP2: one is computed while the next is fetched."""


class Held(NamedTuple):
    """Bytes that one process holds of the model, under one engine.

    Attributes:
        weights: in fp32, and ZeRO's shard of them that the optimizer updates.
        gradients: while activations are at their peak.
        exchange: gradients and their buffers once a step's last backward is done, when activations are gone.
        optimizer: its state.
        average: the moving average of the weights (``optim.ema``); whole but under FSDP2.
    """

    weights: float
    gradients: float
    exchange: float
    optimizer: float
    average: float

    def peak(self, step: float, views: float) -> float:
        """Bytes at the peak of a step that holds ``step`` in activations."""
        return self.weights + self.optimizer + self.average + views + max(self.gradients + step, self.exchange)

    def during_step(self) -> float:
        """Bytes beside activations and views at their peak."""
        return self.weights + self.gradients + self.optimizer + self.average


class Numbers(NamedTuple):
    """Numbers of a network.

    Attributes:
        trained: of trained parameters.
        others: of parameters that are not, and of buffers, of which the engine keeps a copy.
        block: of the largest block's parameters.
    """

    trained: int
    others: int
    block: int

    @classmethod
    def of(cls, network: nn.Module) -> Numbers:
        """Those of ``network``, which may be on the meta device."""
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(network)]
        return cls(trained, frozen + 2 * sum(b.numel() for b in network.buffers()), max(sizes, default=trained))


def held(
    sharing: Sharing,
    numbers: Numbers,
    state: float,
    processes: int,
    *,
    on_gpu: bool = True,
    average: bool = False,
) -> Held:
    """What an engine makes a process hold.

    Args:
        sharing: what the engine shares.
        numbers: of the network.
        state: bytes of optimizer state for each parameter (``optimizer_bytes``).
        processes: of the job.
        on_gpu: whether the processes have GPUs.
        average: whether a moving average of the weights is kept.
    """
    whole, rest = float(_NUMBER * numbers.trained), float(_NUMBER * numbers.others)
    mean, shard = whole if average else 0.0, whole / processes
    if sharing == "ddp":  # gradients are views of its buckets, which are there from the start
        return Held(whole + rest, whole, whole, state * numbers.trained, mean)
    optimizer = state * numbers.trained / processes
    if sharing == "fsdp":
        gathered = float(_GATHERED * _NUMBER * numbers.block)
        return Held(shard + gathered + rest, shard + gathered, shard + gathered, optimizer, mean / processes)
    bucket = float(_NUMBER * min(BUCKET, numbers.trained))
    # shards of the gradient: averaged, and flat for the optimizer
    exchange = bucket + 2 * shard + (max(0.0, whole - bucket) if sharing == "zero1" else 0.0)
    during = bucket if on_gpu else 0.0  # on a CPU, memory that is not written to yet takes none
    return Held(whole + shard + rest, during, exchange, optimizer, mean)


def weights_bytes(encoder: nn.Module) -> float:
    """Bytes of the parameters and buffers of a frozen encoder."""
    return float(sum(tensor.nbytes for tensor in (*encoder.parameters(), *encoder.buffers())))


def optimizer_bytes(config: OptimConfig) -> float:
    """Bytes of optimizer state for each number of a parameter, by a step of the optimizer itself."""
    layer = nn.Linear(64, 64, bias=False)
    optimizer = build_optimizer(
        replace(config, layer_decay=None, decay_all=True, freeze_layers=0, freeze_steps=0), layer
    )
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    own = sum(x.nbytes for x in optimizer.state[layer.weight].values() if isinstance(x, torch.Tensor) and x.ndim)
    return own / layer.weight.numel()


def held_bytes(
    build: Callable[[], nn.Module],
    optim: OptimConfig,
    sharing: Sharing,
    processes: int,
    device: torch.device,
    *,
    copies: int = 0,
) -> float:
    """Bytes of a process for weights, gradients, optimizer state and a moving average while a step computes.

    Args:
        build: makes the network; its values do not matter.
        optim: optimizer and average.
        sharing: what the engine shares among the processes.
        processes: how many share it.
        device: where they compute.
        copies: half-precision copies of all weights: autocast keeps one in each graph, for its backward pass.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        numbers = Numbers.of(build())
    average, on_gpu = optim.ema is not None, device.type == "cuda"
    found = held(sharing, numbers, optimizer_bytes(optim), processes, on_gpu=on_gpu, average=average)
    return found.during_step() + copies * _NUMBER / 2 * numbers.trained
