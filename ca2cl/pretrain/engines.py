"""Engine of a pre-training job: its launcher and ``run.fsdp`` decide."""

from __future__ import annotations

from typing import Any

from torch import nn

from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.runtime.heap import return_freed_memory
from ca2cl.runtime.launched import under_deepspeed
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer


def check_fsdp(config: PretrainConfig, world: int, micro_batch_size: int) -> None:
    """Check that a job of ``world`` processes can do what it asks for under ``run.fsdp``, and make ready for it.

    Raises:
        InputError: it cannot.
    """
    run = config.run
    if not run.fsdp:
        return
    several = run.batch_size // world > micro_batch_size
    reasons = {
        "DeepSpeed's launcher shards by itself; use accelerate_configs/multi_gpu.yaml, or leave run.fsdp out": (
            under_deepspeed()
        ),
        "there is one process, and nothing to share; start several by accelerate launch, or leave it out": world == 1,
        "run.accumulation bitwise reads whole weights; use --run.accumulation exact, or DistributedDataParallel or "
        "ZeRO-1 and ZeRO-2, which do bitwise": run.accumulation == "bitwise",
        "a micro-batch of run.accumulation plain needs two graphs at a time; use --run.accumulation exact": (
            run.accumulation == "plain" and several
        ),
        "LARS needs the norm of whole layers; use --optim.name adam, adamw or sgd": config.optim.name == "lars",
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is not None:
        raise InputError(f"run.fsdp is true: {reason}")
    return_freed_memory()


def build_engine(
    config: PretrainConfig, accelerator: Any, network: nn.Module, micro_batch_size: int
) -> AccelerateEngine:
    """The engine, with the network in it and the optimizer beside it.

    Args:
        config: the job's.
        accelerator: of ``build_accelerator``.
        network: what is trained, the same on every rank; it is cut in place under ``run.fsdp``.
        micro_batch_size: tiles that a process holds at a time.
    """
    run = config.run
    if under_deepspeed():
        from ca2cl.training.deepspeed import DeepSpeedEngine

        optimizer = build_optimizer(config.optim, network)
        return DeepSpeedEngine(accelerator, network, optimizer, run.precision, config.optim, micro_batch_size)
    kind = AccelerateEngine
    if run.fsdp:
        from ca2cl.training.fsdp import FsdpEngine, shard

        network, kind = shard(network, accelerator.device), FsdpEngine
    optimizer = build_optimizer(config.optim, network, fused=accelerator.device.type == "cuda")
    return kind(accelerator, network, optimizer, run.precision)
