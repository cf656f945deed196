"""Memory of a process of a planned job, by engine and micro-batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ca2cl.common.tables import fitted
from ca2cl.doctor.plan.config import PlanConfig
from ca2cl.errors import InputError
from ca2cl.methods.base import Method, Tiles
from ca2cl.models.backbone import Backbone, outline
from ca2cl.pretrain.batches import KEPT_BYTES
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.engines import configured_method
from ca2cl.pretrain.memory.activations import StepMemory
from ca2cl.pretrain.memory.dry_step import step_memory
from ca2cl.pretrain.memory.held import Held, Numbers, Sharing, held, optimizer_bytes, weights_bytes
from ca2cl.pretrain.numerics import views_dtype
from ca2cl.pretrain.teacher import live_teacher, resolve_teacher

ENGINES: dict[Sharing, str] = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "fsdp": "FSDP2"}


class Steps(NamedTuple):
    """Activations of a step.

    Attributes:
        direct: of a process's whole share at a time.
        accumulated: of several micro-batches.
        sharded: of one micro-batch or several under FSDP2, which holds one graph at a time; None for one process.
    """

    direct: StepMemory
    accumulated: StepMemory
    sharded: StepMemory | None

    def of(self, sharing: Sharing, rows: int, share: int) -> float:
        """Bytes under an engine, of a micro-batch of ``rows`` of a process's ``share``."""
        step = self.direct if rows == share else self.accumulated
        if sharing == "fsdp":
            assert self.sharded is not None
            step = self.sharded
        return step.of(rows)


@dataclass(frozen=True)
class Plan:
    """Memory of each process of a job, in bytes.

    Attributes:
        trained: trained parameters, heads included.
        share: tiles of a process.
        views: of its share, and the tiles themselves.
        teacher: weights of a frozen encoder that the method uses; 0 without one, or with one whose features are cached.
        engines: what each holds of the model.
        kept: a step's activations.
        recomputed: the same with activation checkpointing; None for a body without it.
    """

    trained: int
    share: int
    views: float
    teacher: float
    engines: dict[Sharing, Held]
    kept: Steps
    recomputed: Steps | None

    def peak(self, sharing: Sharing, steps: Steps, rows: int, views: float | None = None) -> float:
        """Bytes of a process at its peak.

        Args:
            sharing: under which engine.
            steps: ``kept`` or ``recomputed``.
            rows: of a micro-batch.
            views: of the views, where they are not those of the job.
        """
        beside = self.teacher + (self.views if views is None else views)
        return self.engines[sharing].peak(steps.of(sharing, rows, self.share), beside)


def plan(config: PlanConfig) -> Plan:
    """The memory of the job.

    Raises:
        InputError: the settings are not those of a job, or the method's step cannot be followed.
    """
    method = configured_method(config)
    teacher = _give_teacher(config, method)
    network = _build(config, method, recomputed=False)()
    numbers, state, share = (
        Numbers.of(network),
        optimizer_bytes(config.optim),
        config.run.batch_size // config.processes,
    )
    average, on_gpu = config.optim.ema is not None, config.device == "gpu"
    engines = {
        sharing: held(sharing, numbers, state, config.processes, on_gpu=on_gpu, average=average)
        for sharing in ENGINES
        if sharing != "fsdp" or config.processes > 1
    }
    recomputed = _steps(config, method, share, recomputed=True) if _can_recompute(network.encoder) else None
    kept = _steps(config, method, share, recomputed=False)
    return Plan(numbers.trained, share, _views_bytes(config, share), teacher, engines, kept, recomputed)


def run(config: PlanConfig) -> int:
    """Print the plan; returns 0.

    Raises:
        InputError: see ``plan``.
    """
    found = plan(config)
    sys.stdout.write(
        f"{config.model.arch} of {found.trained / 1e6:.1f} million trained parameters with heads, "
        f"{config.data.image_size} px;\nmethod {config.method.name}; precision {config.run.precision}; "
        f"{config.optim.name}\n"
        f"{config.processes} processes, {found.share} tiles of a batch of {config.run.batch_size} each\n\n"
    )
    names = {
        "weights": "weights", "gradients": "gradients", "gradients, exchanged": "exchange", "optimizer": "optimizer",
        "moving average": "average",
    }  # fmt: skip
    parts = [(name, *(_gb(getattr(one, field)) for one in found.engines.values())) for name, field in names.items()]
    if found.teacher:
        parts.append(("teacher", *[_gb(found.teacher)] * len(found.engines)))
    parts.append(("views", *[_gb(found.views)] * len(found.engines)))
    heads = [ENGINES[sharing] for sharing in found.engines]
    sys.stdout.write(fitted(("memory of a process, GB", *heads), parts))
    for title, steps in (("kept", found.kept), ("recomputed (model.checkpoint_activations)", found.recomputed)):
        if steps is not None:
            sys.stdout.write(f"\npeak by micro-batch, activations {title}, GB\n")
            sys.stdout.write(_peaks(found, steps, config.memory_gb or _first_gpu(config)))
    sys.stdout.flush()
    return 0


def _peaks(found: Plan, steps: Steps, limit: float | None) -> str:
    rows = []
    for size in _sizes(found.share):
        peaks = [found.peak(sharing, steps, size) for sharing in found.engines]
        marks = ["" if limit is None or peak <= 1e9 * limit else " (too much)" for peak in peaks]
        cells = [f"{_gb(peak)}{mark}" for peak, mark in zip(peaks, marks, strict=True)]
        rows.append((str(size), _gb(steps.of("ddp", size, found.share)), *cells))
    return fitted(("tiles", "activations", *(ENGINES[sharing] for sharing in found.engines)), rows)


class _AllKnown:
    """A teacher whose features are cached (``methods.base.Teacher``)."""

    def __init__(self, feature_dim: int) -> None:
        self.feature_dim = feature_dim

    def known(self, tiles: Tiles) -> Tensor:
        return torch.empty(len(tiles.keys), self.feature_dim, device=tiles.pixels.device)

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        raise AssertionError


def _give_teacher(config: PlanConfig, method: Method) -> float:
    """Hand the method its teacher; returns the bytes of its weights while it trains."""
    source = method.teacher_source
    if source is None:
        return 0.0
    found = resolve_teacher(config, source)
    if source.cache:
        method.take_teacher(_AllKnown(found.card.feature_dim))
        return 0.0
    method.take_teacher(live_teacher(config, source, found, _device(config)))
    return weights_bytes(found.encoder)


def _can_recompute(encoder: Backbone) -> bool:
    """Whether the body's blocks are known."""
    try:
        return bool(encoder.blocks())
    except InputError:
        return False


def _steps(config: PlanConfig, method: Method, share: int, *, recomputed: bool) -> Steps:
    build, device = _build(config, method, recomputed=recomputed), _device(config)
    size, dtype = config.data.image_size, views_dtype(config)

    def step(micro_batches: int, *, sharded: bool = False) -> StepMemory:
        return step_memory(
            method, build, size, dtype, device, micro_batches=micro_batches, recomputed=recomputed, sharded=sharded
        )

    try:
        direct = step(1)
        return Steps(direct, step(2) if share > 1 else direct, step(1, sharded=True) if config.processes > 1 else None)
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
