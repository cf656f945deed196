"""How a step's time grows with processes: the model that docs/scaling.md explains, for numbers of your own.

    python -m benchmarks.growth [--arch resnet18] [--tile_ms 0.61] [--bandwidth 20] [--latency 100]
                                [--weak 64] [--strong 8192]

Nothing is measured here. Every term is a count of bytes, operations or messages of this code, over a rate that is given
or assumed; nothing is taken to overlap. ``--tile_ms`` is what a step takes on one device, over its tiles.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import BatchNorm
from ca2cl.models.heads import Network
from ca2cl.models.resnet import ARCHITECTURES

DIM, CLUSTERS, ITERATIONS = 128, 10, 10
COLUMNS = (
    "processes", "batch", "tiles each", "encoder", "losses", "gather", "gradients", "messages", "step", "of ideal",
    "sync",
)  # fmt: skip
MESSAGES = 14
"""Collectives of a step whatever its size: gathers of places, of embeddings (3) and of log Z (2); the direction,
running statistics, loss terms, stop flag, the gradient's norm, and three buckets of gradients."""

GATHERS, REDUCTIONS = 11, 3
"""Times that a micro-batch's step gathers every weight under FSDP2, and reduces every gradient: weights for each of
seven passes forward and four backward (``tests/jobs/pretrain/test_fsdp.py`` counts them)."""


@dataclass(frozen=True)
class Machine:
    """Rates that the model takes as given."""

    tile_ms: float
    bandwidth: float
    """Bytes a second into and out of a process, while all of them talk."""
    latency: float
    """Seconds of a small all-reduce over all processes."""
    flops: float
    """fp32 operations a second in the losses' matrix products."""
    memory: float
    """Bytes a second of the device's memory."""


class Model(NamedTuple):
    """What of a network the model depends on."""

    parameters: int
    norm_layers: int
    norm_channels: int
    stem: int

    @classmethod
    def of(cls, arch: str, image_size: int = 224) -> Model:
        with torch.device("meta"):
            network = Network(build_encoder(arch, image_size=image_size), DIM)
        layers = [layer for layer in network.modules() if isinstance(layer, BatchNorm)]
        count, stem = sum(p.numel() for p in network.parameters()), network.encoder.stem.weight.numel()
        return cls(count, len(layers), sum(layer.num_features for layer in layers), stem)


def gradient_bytes(model: Model, world: int, number: int = 4) -> float:
    """What one process sends in a ring all-reduce of every parameter's gradient, ``number`` bytes each."""
    return 2 * (world - 1) / world * number * model.parameters


def sharded_bytes(model: Model, world: int, micro_batches: int = 1) -> float:
    """What one process sends under FSDP2, in rings: gloo reduces whole gradients, and cuts them afterwards."""
    whole = (world - 1) / world * 4 * model.parameters
    return micro_batches * (GATHERS + 2 * REDUCTIONS) * whole


def gather_bytes(batch: int, world: int) -> float:
    """What one process receives: z1, z2, g1, g2, then z2, z_adv, a place and two times two log Z of every tile."""
    return (world - 1) / world * batch * (6 * DIM * 4 + 8 + 4 * 4)


def statistics_bytes(model: Model, world: int) -> float:
    """The direction (a number a weight of the stem) and lane_group's running statistics of two views, in double."""
    return 2 * (world - 1) / world * 8 * (model.stem + 2 * (2 * model.norm_channels + model.norm_layers))


def loss_seconds(batch: int, world: int, machine: Machine) -> float:
    """Two NT-Xents, own rows against all columns, three products each; k-means and cluster loss, whole everywhere."""
    nt_xent = 2 * 3 * 2 * DIM * (2 * batch / world) * (2 * batch)
    clusters = 2 * (ITERATIONS + 4) * 2 * DIM * CLUSTERS * batch
    passes = 2 * 6 * 4 * (2 * batch / world) * (2 * batch) + 2 * (2 * ITERATIONS + 8) * 4 * DIM * batch
    return (nt_xent + clusters) / machine.flops + passes / machine.memory


def sync_messages(model: Model) -> int:
    """All-reduces of sync BatchNorm in a step: one a layer and pass, three forward and four backward."""
    return model.norm_layers * (3 + 4)


def row(model: Model, machine: Machine, world: int, batch: int) -> str:
    """A line of the table, in milliseconds."""
    alone = batch / world * machine.tile_ms / 1e3
    several = world > 1
    parts = [
        alone,
        loss_seconds(batch, world, machine),
        gather_bytes(batch, world) / machine.bandwidth,
        (gradient_bytes(model, world) + statistics_bytes(model, world)) / machine.bandwidth,
        several * MESSAGES * machine.latency,
    ]
    total = sum(parts)
    sync = total + several * sync_messages(model) * machine.latency
    cells = [f"{1e3 * part:.1f}" for part in parts]
    return (
        f"| {world:,} | {batch:,} | {batch / world:g} | {' | '.join(cells)} | {1e3 * total:.1f} | {alone / total:.0%} "
        f"| {alone / sync:.0%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="resnet18")
    parser.add_argument(
        "--tile_ms",
        type=float,
        default=0.61,
        help="a step's time on one device, a tile (benchmarks.kernels says from where)",
    )
    parser.add_argument("--bandwidth", type=float, default=20.0, help="GB/s of a process (assumed)")
    parser.add_argument("--latency", type=float, default=100.0, help="microseconds of a small all-reduce (assumed)")
    parser.add_argument("--flops", type=float, default=10.0, help="fp32 TFLOP/s of the losses (assumed)")
    parser.add_argument("--memory", type=float, default=1.3, help="TB/s of the device's memory (assumed)")
    parser.add_argument("--weak", type=int, default=64, help="tiles a process, where the batch grows with processes")
    parser.add_argument("--strong", type=int, default=8192, help="tiles of the batch, where it does not")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8, 64, 256, 1024])
    options = parser.parse_args()
    model = Model.of(options.arch)
    machine = Machine(
        options.tile_ms, options.bandwidth * 1e9, options.latency / 1e6, options.flops * 1e12, options.memory * 1e12
    )
    for title, batches in [
        (f"{options.weak} tiles a process", [options.weak * world for world in options.processes]),
        (f"a batch of {options.strong:,}", [options.strong for _ in options.processes]),
    ]:
        print(f"{options.arch}, {title}; milliseconds\n")
        print(f"| {' | '.join(COLUMNS)} |\n{'| --- ' * len(COLUMNS)}|")
        for world, batch in zip(options.processes, batches, strict=True):
            print(row(model, machine, world, batch))
        print()


if __name__ == "__main__":
    main()
