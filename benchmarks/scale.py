"""Memory and time of a step against the global batch, whole and by exact accumulation; the loss's cost; bytes sent.

    python -m benchmarks.scale [--batches 512 2048 8192] [--losses 2048 8192 32768 65536] [--micro_batch 256]
                               [--image_size 32] [--threads 2]

Every row is measured in a process of its own, so that its peak of resident memory is its own. ResNet-18, fp32,
clusters and adversary on, on the CPU. Baseline of the ratios: the same step with the whole batch at once
(direct), where ``--direct_up_to`` lets it run; bitwise goes through it in units of 32 tiles. The second table times
k-means, both NT-Xents and the cluster loss, forward and backward, on embeddings alone; their share is of the encoder's
time for that batch in a direct step, extrapolated from the largest one that was run (the encoder's time is proportional
to the batch, the losses' is not). The third table is ``benchmarks.wire``'s, where it may run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks import wire
from benchmarks.step import OBJECTIVE
from ca2cl.methods.base import LocalEngine, ViewBatch
from ca2cl.methods.bitwise import Bitwise
from ca2cl.methods.ca2cl.losses import adversarial_term, clean_terms, weighted_sum
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.gather import Rows
from ca2cl.models.backbone import build_encoder
from ca2cl.models.bn_groups import LaneGroups
from ca2cl.models.heads import Embeddings, Network

GROUP, GROUPS = 16, 4


class Synthetic:
    """Micro-batches of noise, made anew whenever they are asked for, as the feed makes views."""

    def __init__(self, batch: int, size: int, side: int) -> None:
        self.batch, self.size, self.side = batch, size, side
        self.groups = LaneGroups(lanes=batch, batch_size=batch, group=GROUP, groups=GROUPS)

    def __len__(self) -> int:
        return self.batch // self.size

    def __getitem__(self, number: int) -> ViewBatch:
        if number >= len(self):
            raise IndexError(number)
        generator = torch.Generator().manual_seed(number)
        x1, x2 = (torch.randn(self.size, 3, self.side, self.side, generator=generator) for _ in range(2))
        rows = torch.arange(number * self.size, (number + 1) * self.size)
        return ViewBatch(*(x.contiguous(memory_format=torch.channels_last) for x in (x1, x2)), rows,
                         self.groups.second_order(self.size))  # fmt: skip


def one_step(batch: int, micro_batch: int, side: int, accumulation: Literal["exact", "bitwise"]) -> float:
    """Seconds of one gradient of the whole batch."""
    torch.manual_seed(0)
    network = Network(build_encoder(norm="lane_group", group=GROUP, identity_blocks=True)).train()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    began = time.perf_counter()
    method = CA2CL(OBJECTIVE)
    step = Bitwise(method, GROUPS * GROUP).step if accumulation == "bitwise" else method.step
    step(LocalEngine(network), Synthetic(batch, micro_batch, side))  # type: ignore[arg-type]
    return time.perf_counter() - began


def losses_only(batch: int) -> float:
    """Seconds of everything between embeddings and their gradients."""
    generator = torch.Generator().manual_seed(0)
    z1, z2, z3, g1, g2 = (
        F.normalize(torch.randn(batch, 128, generator=generator), dim=1).requires_grad_() for _ in range(5)
    )
    began = time.perf_counter()
    rows = Rows.at(torch.arange(batch))
    weighted_sum(clean_terms(Embeddings(z1, g1), Embeddings(z2, g2), rows, OBJECTIVE), OBJECTIVE).backward()
    adversarial_term(z2, z3, rows, torch.tensor(True), OBJECTIVE).backward()
    return time.perf_counter() - began


def measured(*arguments: str) -> dict[str, float]:
    """Seconds and peak memory (GB) of one row, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--row", *arguments]
    return dict(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


def row(kind: str, batch: int, micro_batch: int, side: int, threads: int) -> None:
    torch.set_num_threads(threads)
    seconds = losses_only(batch) if kind == "losses" else one_step(batch, micro_batch, side, kind)  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"seconds": seconds, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--losses", type=int, nargs="+", default=[2048, 8192, 32768, 65536])
    parser.add_argument("--micro_batch", type=int, default=256)
    parser.add_argument("--direct_up_to", type=int, default=2048, help="largest batch that is also held at once")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--wire", action=argparse.BooleanOptionalAction, default=True, help="count bytes sent, too")
    parser.add_argument("--row", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        kind, *numbers = options.row
        row(kind, *map(int, numbers))
        return
    common = str(options.image_size), str(options.threads)
    print("| batch | exact: s | GB | direct: s | GB | exact / direct | bitwise / direct |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    per_tile = float("nan")
    for batch in options.batches:
        cached = measured("exact", str(batch), str(min(batch // 2, options.micro_batch)), *common)
        line = f"| {batch:,} | {cached['seconds']:.1f} | {cached['peak']:.2f} |"
        if batch <= options.direct_up_to:
            direct, bitwise = (measured(kind, str(batch), str(batch), *common) for kind in ("exact", "bitwise"))
            per_tile = direct["seconds"] / batch
            ratios = [found["seconds"] / direct["seconds"] for found in (cached, bitwise)]
            line += f" {direct['seconds']:.1f} | {direct['peak']:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
        else:
            line += " - | - | - | - |"
        print(line, flush=True)
    print("\n| batch | losses: s | GB | share of the encoder's time |\n| --- | --- | --- | --- |")
    for batch in options.losses:
        found = measured("losses", str(batch), "0", *common)
        share = found["seconds"] / (per_tile * batch)
        print(f"| {batch:,} | {found['seconds']:.2f} | {found['peak']:.2f} | {share:.1%} |", flush=True)
    if options.wire and wire.available():
        print()
        wire.table(["ddp", "zero1", "zero2"], processes=2, batch=64)


if __name__ == "__main__":
    main()
