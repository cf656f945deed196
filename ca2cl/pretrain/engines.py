"""Method and engine of a pre-training job.

The job's settings and its launcher choose them.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from ca2cl.errors import InputError
from ca2cl.methods.base import Method, MethodSettings
from ca2cl.methods.registry import build_method
from ca2cl.models.backbone import Backbone
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.memory.held import Sharing
from ca2cl.runtime.heap import return_freed_memory
from ca2cl.runtime.launched import under_deepspeed
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer


def configured_method(config: PretrainConfig) -> Method:
    """The method that ``method.name`` names, with its settings.

    Raises:
        InputError: there is none of that name, or it refuses its settings.
    """
    accumulation: Literal["exact", "plain"] = "plain" if config.run.accumulation == "plain" else "exact"
    settings = MethodSettings(config.objective, config.model.projection_dim, accumulation)
    return build_method(config.method.name, settings, config.method.options)


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


def sharing(config: PretrainConfig, accelerator: Any) -> Sharing:
    """What the engine of a job shares among its processes; ``accelerator`` knows DeepSpeed's stage."""
    if config.run.fsdp:
        return "fsdp"
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return "ddp" if plugin is None else "zero1" if plugin.zero_stage == 1 else "zero2"


def build_engine(
    config: PretrainConfig, accelerator: Any, method: Method, encoder: Backbone, micro_batch_size: int
) -> AccelerateEngine:
    """The engine, with the method's network in it, the optimizer beside it, and a moving average if one is kept.

    Args:
        config: the job's.
        accelerator: of ``build_accelerator``.
        method: builds the network.
        encoder: to be trained, the same on every rank; under ``run.fsdp`` it is cut in place.
        micro_batch_size: tiles that a process holds at a time.

    Raises:
        InputError: the encoder's layers are not known, and a setting needs them.
    """
    if config.model.checkpoint_activations:
        encoder.set_grad_checkpointing()
    network = method.build(encoder)
    engine = _engine(config, accelerator, network, method.encoder(network), micro_batch_size)
    engine.keep_average(config.optim.ema)
    return engine


def _engine(
    config: PretrainConfig, accelerator: Any, network: nn.Module, encoder: Backbone, micro_batch_size: int
) -> AccelerateEngine:
    run = config.run
    if under_deepspeed():
        from ca2cl.training.deepspeed import DeepSpeedEngine

        optimizer = build_optimizer(config.optim, network, encoder)
        return DeepSpeedEngine(accelerator, network, optimizer, run.precision, config.optim, micro_batch_size)
    kind = AccelerateEngine
    if run.fsdp:
        from ca2cl.training.fsdp import FsdpEngine, shard

        network, kind = shard(network, accelerator.device), FsdpEngine
    optimizer = build_optimizer(config.optim, network, encoder, fused=accelerator.device.type == "cuda")
    return kind(accelerator, network, optimizer, run.precision)
