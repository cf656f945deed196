"""Memory of a process of a planned job, by engine and micro-batch.

Weights are fp32 under every engine and precision: autocast rounds copies of them (``runtime.accelerator``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ca2cl.common.tables import aligned
from ca2cl.doctor.plan.config import PlanConfig
from ca2cl.errors import InputError
from ca2cl.methods.base import Method, Teacher, Tiles
from ca2cl.models.backbone import Backbone, outline
from ca2cl.pretrain.batches import KEPT_BYTES
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.engines import configured_method
from ca2cl.pretrain.memory.dry_step import StepMemory, step_memory
from ca2cl.pretrain.numerics import views_dtype
from ca2cl.pretrain.teacher import live_teacher, resolve_teacher
from ca2cl.training.deepspeed import BUCKET
from ca2cl.training.optim import build_optimizer

ENGINES = ("DDP", "ZeRO-1", "ZeRO-2")
_FLOAT = 4


class EngineMemory(NamedTuple):
    """Bytes that one process holds of the model, under one engine.

    Attributes:
        weights: in fp32, and ZeRO's shard of them that the optimizer updates.
        gradients: while activations are at their peak.
        exchange: gradients and their buffers once a step's last backward is done, when activations are gone.
        optimizer: its state.
        average: the moving average of the weights (``optim.ema``), whole on every process.
    """

    weights: float
    gradients: float
    exchange: float
    optimizer: float
    average: float

    def peak(self, step: float, views: float) -> float:
        """Bytes at the peak of a step that holds ``step`` in activations."""
        return self.weights + self.optimizer + self.average + views + max(self.gradients + step, self.exchange)


def engine_memory(
    engine: str,
    trained: int,
    frozen: int,
    state: float,
    processes: int,
    device: Literal["gpu", "cpu"] = "gpu",
    *,
    average: bool = False,
) -> EngineMemory:
    """The memory of one engine.

    Args:
        engine: of ``ENGINES``.
        trained: trained parameters.
        frozen: numbers that are not trained, buffers, their copies and averages among them.
        state: bytes of optimizer state for each parameter.
        processes: of the job.
        device: kind of the device.
        average: whether a moving average of the weights is kept.
    """
    whole, rest, shard = _FLOAT * trained, _FLOAT * frozen, _FLOAT * trained / processes
    mean = float(whole) if average else 0.0
    if engine == "DDP":  # gradients are views of its buckets, which are there from the start
        return EngineMemory(whole + rest, whole, whole, state * trained, mean)
    bucket = _FLOAT * min(BUCKET, trained)
    # shards of the gradient: averaged, and flat for the optimizer
    exchange = bucket + 2 * shard + (max(0, whole - bucket) if engine == "ZeRO-1" else 0)
    during = bucket if device == "gpu" else 0  # on a CPU, memory that is not written to yet takes none
    return EngineMemory(whole + shard + rest, during, exchange, state * trained / processes, mean)


def optimizer_bytes(config: PretrainConfig) -> float:
    """Bytes of optimizer state for each number of a parameter, by a step of the optimizer itself."""
    layer = nn.Linear(64, 64, bias=False)
    ungrouped = replace(config.optim, layer_decay=None, decay_all=True, freeze_layers=0, freeze_steps=0)
    optimizer = build_optimizer(ungrouped, layer)
    layer.weight.grad = torch.zeros_like(layer.weight)
    optimizer.step()
    held = sum(x.nbytes for x in optimizer.state[layer.weight].values() if isinstance(x, torch.Tensor) and x.ndim)
    return held / layer.weight.numel()


@dataclass(frozen=True)
class Plan:
    """Memory of each process of a job, in bytes.

    Attributes:
        trained: trained parameters, heads included.
        share: tiles of a process.
        views: of its share, and the tiles themselves.
        engines: what each holds of the model.
        kept: a step's activations: of the whole share at a time (1), and of several micro-batches (2).
        recomputed: the same with activation checkpointing; empty for a body without it.
    """

    trained: int
    share: int
    views: float
    engines: dict[str, EngineMemory]
    kept: dict[int, StepMemory]
    recomputed: dict[int, StepMemory]


def plan(config: PlanConfig) -> Plan:
    """The memory of the job.

    Raises:
        InputError: the settings are not those of a job, or the method's step cannot be followed.
    """
    method = configured_method(config)
    _give_teacher(config, method)
    network = _build(config, method, recomputed=False)()
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in network.parameters() if not p.requires_grad)
    frozen += 2 * sum(b.numel() for b in network.buffers())  # the engine keeps a copy of them
    state, share = optimizer_bytes(config), config.run.batch_size // config.processes
    engines = {
        engine: engine_memory(
            engine, trained, frozen, state, config.processes, config.device, average=config.optim.ema is not None
        )
        for engine in ENGINES
    }
    recomputed = _steps(config, method, share, recomputed=True) if _can_recompute(network.encoder) else {}
    kept = _steps(config, method, share, recomputed=False)
    return Plan(trained, share, _views_bytes(config, share), engines, kept, recomputed)


def run(config: PlanConfig) -> int:
    """Print the plan; returns 0.

    Raises:
        InputError: see ``plan``.
    """
    found = plan(config)
    sys.stdout.write(
        f"{config.model.arch} of {found.trained / 1e6:.1f} million trained parameters with heads, "
        f"{config.data.image_size} px; method {config.method.name}; precision {config.run.precision}; "
        f"{config.optim.name}\n"
        f"{config.processes} processes, {found.share} tiles of a batch of {config.run.batch_size} each\n\n"
    )
    names = {
        "weights": "weights", "gradients": "gradients", "gradients, exchanged": "exchange", "optimizer": "optimizer",
        "moving average": "average",
    }  # fmt: skip
    parts = [(name, *(_gb(getattr(one, field)) for one in found.engines.values())) for name, field in names.items()]
    parts.append(("views", *[_gb(found.views)] * len(ENGINES)))
    sys.stdout.write(aligned(("memory of a process, GB", *ENGINES), parts))
    for title, steps in (("kept", found.kept), ("recomputed (model.checkpoint_activations)", found.recomputed)):
        if steps:
            sys.stdout.write(f"\npeak by tiles of a micro-batch, activations {title}, GB\n")
            sys.stdout.write(_peaks(found, steps, config.memory_gb or _first_gpu(config)))
    sys.stdout.flush()
    return 0


def _peaks(found: Plan, steps: dict[int, StepMemory], limit: float | None) -> str:
    rows = []
    for size in _sizes(found.share):
        step = steps[1 if size == found.share else 2].of(size)
        peaks = [engine.peak(step, found.views) for engine in found.engines.values()]
        marks = ["" if limit is None or peak <= 1e9 * limit else " (too much)" for peak in peaks]
        rows.append((str(size), _gb(step), *(f"{_gb(peak)}{mark}" for peak, mark in zip(peaks, marks, strict=True))))
    return aligned(("tiles", "activations", *ENGINES), rows)


class _AllKnown:
    """A teacher whose features are cached (``methods.base.Teacher``)."""

    def __init__(self, feature_dim: int) -> None:
        self.feature_dim = feature_dim

    def known(self, tiles: Tiles) -> Tensor:
        return torch.empty(len(tiles.keys), self.feature_dim, device=tiles.pixels.device)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        raise AssertionError


def _give_teacher(config: PlanConfig, method: Method) -> None:
    source = method.teacher_source
    if source is None:
        return
    found = resolve_teacher(config, source)
    teacher: Teacher = _AllKnown(found.card.feature_dim)
    if not source.cache:
        teacher = live_teacher(config, source, found, _device(config))
    method.take_teacher(teacher)


def _can_recompute(encoder: Backbone) -> bool:
    """Whether the body's blocks are known."""
    try:
        return bool(encoder.blocks())
    except InputError:
        return False


def _steps(config: PlanConfig, method: Method, share: int, *, recomputed: bool) -> dict[int, StepMemory]:
    build, device = _build(config, method, recomputed=recomputed), _device(config)
    size, dtype = config.data.image_size, views_dtype(config)
    counts = (1, 2) if share > 1 else (1,)
    try:
        return {count: step_memory(method, build, size, dtype, device, micro_batches=count) for count in counts}
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise InputError(
            f"method.name is {config.method.name!r}: its step cannot be followed without numbers "
            f"({str(error).splitlines()[0]}); measure it on one process"
        ) from None


def _device(config: PlanConfig) -> torch.device:
    """Whose operators are followed: a GPU's where there is one."""
    return torch.device("cuda" if config.device == "gpu" and torch.cuda.is_available() else "cpu")


def _sizes(share: int) -> list[int]:
    """Powers of two that divide a process's share, and the share."""
    powers = [2**number for number in range(1, share.bit_length())]
    return sorted({size for size in powers if share % size == 0} | {share})


def _build(config: PretrainConfig, method: Method, *, recomputed: bool) -> Callable[[], Any]:
    def build() -> nn.Module:
        # frozen: sync would wait for the other ranks
        encoder = outline(config.model.arch, "frozen", image_size=config.data.image_size, pooling=config.model.pooling)
        if recomputed:
            encoder.set_grad_checkpointing()
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = method.build(encoder)
        half = config.run.precision != "no"
        network.autocast_dtype = torch.bfloat16 if half else None  # type: ignore[assignment]  # fp16 is as large
        return network

    return build


def _views_bytes(config: PretrainConfig, share: int) -> float:
    """Views of a process's share of a batch, as far as they are kept, and its tiles."""
    pixels = 3 * config.data.image_size**2
    return min(2 * share * pixels * views_dtype(config).itemsize, KEPT_BYTES) + share * pixels


def _first_gpu(config: PlanConfig) -> float | None:
    if config.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory / 1e9


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}"
