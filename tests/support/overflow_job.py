"""A job of a few steps in which one rank's gradient overflows, for ``test_half_precision``: run it under a launcher.

    accelerate launch ... -m tests.support.overflow_job OUT PRECISION STEPS...

STEPS are seeds of the steps' views; of one that ends in ``!``, rank 1 alone gets an infinite gradient.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ca2cl.config import ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from ca2cl.methods.base import ViewBatch
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.models.backbone import build_encoder
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.engines import build_engine
from ca2cl.runtime.accelerator import build_accelerator

ROWS = 8


def digest(network: Any) -> float:
    return sum(float(value.double().abs().sum()) for value in network.state_dict().values())


def projector(network: Any) -> list[float]:
    return torch.cat([value.detach().flatten() for value in network.projector.parameters()]).tolist()


def views(seed: int, rank: int, world: int) -> ViewBatch:
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = (torch.randn(ROWS * world, 3, 32, 32, generator=generator) for _ in range(2))
    rows = torch.arange(rank, ROWS * world, world)
    return ViewBatch(x1[rows], x2[rows], rows)


def on_rank(_rank: int, out: Path, precision: str, steps: Sequence[str]) -> None:
    """Take the steps on this process, one of those that a launcher has told of each other; rank 0 writes ``out``."""
    config = PretrainConfig(
        model=ModelConfig(norm="sync"),
        optim=OptimConfig(name="sgd", lr=1e-3, clip_norm=1e6),
        run=RunConfig(precision=precision),  # type: ignore[arg-type]
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = build_accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    method, overflowing = CA2CL(ObjectiveConfig(clusters=3, epsilon=0.1, epsilon_mode="relative")), False
    engine = build_engine(config, accelerator, method, build_encoder(identity_blocks=True).train(), ROWS)
    if engine.scaler is not None:
        engine.scaler._init_scale = 2.0**10  # at torch's first scale the stem's gradient overflows in every step

    def overflow(grad: Tensor) -> Tensor:
        return grad * float("inf") if overflowing and rank == 1 else grad

    engine.bare.projector.out.bias.register_hook(overflow)
    lines, start = [], projector(engine.bare)
    for step in steps:
        overflowing = step.endswith("!")
        engine.keep_buffers()
        scale, before = float(engine.loss_scale), digest(engine.bare)
        terms = method.step(engine, [views(int(step.rstrip("!")), rank, world)])
        norm, skipped = engine.optimizer_step(1e-3, 1e6)
        mine = {"loss": float(terms["loss"]), "norm": float(norm), "skipped": bool(skipped),
                "moved": digest(engine.bare) != before,
                "scale": scale, "digest": digest(engine.bare)}  # fmt: skip
        lines.append(engine.gather_list([mine]))
    if rank == 0:
        out.write_text(json.dumps({"steps": lines, "start": start, "end": projector(engine.bare)}))
    accelerator.wait_for_everyone()  # a launcher ends every process once one has ended otherwise than with 0
    accelerator.end_training()


if __name__ == "__main__":
    on_rank(-1, Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
