"""CPU seconds of an optimizer step on several gloo processes, over those of one process with the same whole batch.

    python -m benchmarks.processes [--norms sync lane_group frozen] [--processes 2] [--image_size 64] [--batch_size 64]
                                   [--repeats 7]

ResNet-18, fp32, CA2CL with clusters and adversary, one thread a process, tiles of noise. Every process lives through
all rounds, in which the job of one and the job of several take a step in turns. CPU time is that of all of a job's
processes, the exchange's threads and the kernel's share included: work that is done twice and waiting that is not
idle show, whatever else the machine does. The ratio is the median of the rounds', in brackets their range.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack

FLOOR = 1.25


class Process:
    """One process of a job, which takes a step for each line that it is sent."""

    def __init__(self, rank: int, world: int, port: int, norm: str, options: argparse.Namespace) -> None:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
        command = [
            sys.executable, "-m", "benchmarks.processes", "--norms", norm, "--serve",
            "--image_size", str(options.image_size), "--batch_size", str(options.batch_size),
        ]  # fmt: skip
        env |= {name: str(value) for name, value in place.items()} if world > 1 else {}
        self._child = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self) -> None:
        """Take a step."""
        assert self._child.stdin is not None
        self._child.stdin.write("\n")
        self._child.stdin.flush()

    def seconds(self) -> float:
        """CPU seconds of the step that was started."""
        assert self._child.stdout is not None
        return float(self._child.stdout.readline())

    def end(self) -> None:
        """Kill it."""
        self._child.kill()
        self._child.wait()


def serve(options: argparse.Namespace) -> None:
    """Take a step for each line of the input, and answer with its CPU seconds."""
    import torch

    from benchmarks.step import OBJECTIVE
    from ca2cl.config import OptimConfig
    from ca2cl.methods.base import ViewBatch
    from ca2cl.methods.ca2cl.method import CA2CL
    from ca2cl.models.backbone import build_encoder
    from ca2cl.models.bn_groups import LaneGroups
    from ca2cl.models.heads import Network
    from ca2cl.runtime.accelerator import build_accelerator
    from ca2cl.training.engine import AccelerateEngine
    from ca2cl.training.optim import build_optimizer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    accelerator = build_accelerator()
    network = Network(build_encoder(norm=options.norms[0], identity_blocks=True)).train()
    config = OptimConfig(name="adamw", lr=1e-4)
    engine = AccelerateEngine(accelerator, network, build_optimizer(config, network))
    whole, side = options.batch_size, options.image_size
    share = whole // accelerator.num_processes
    rows = torch.arange(share) + share * accelerator.process_index
    x1, x2 = (torch.randn(whole, 3, side, side)[rows].contiguous(memory_format=torch.channels_last) for _ in range(2))
    groups = LaneGroups(whole, whole, 16, 2).second_order(share) if options.norms[0] == "lane_group" else None
    method, views = CA2CL(OBJECTIVE), ViewBatch(x1, x2, rows, groups)
    for _ in sys.stdin:
        began = time.process_time()
        engine.keep_buffers()
        terms = method.step(engine, [views])
        engine.optimizer_step(config.lr, None, terms["loss"])
        sys.stdout.write(f"{time.process_time() - began}\n")
        sys.stdout.flush()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def compare(norm: str, options: argparse.Namespace) -> None:
    """Measure and print one line."""
    port, world = free_port(), options.processes
    jobs = {1: [Process(0, 1, 0, norm, options)], world: [Process(r, world, port, norm, options) for r in range(world)]}
    taken: dict[int, list[float]] = {1: [], world: []}
    with ExitStack() as stack:
        for process in (one for job in jobs.values() for one in job):
            stack.callback(process.end)
        for _ in range(options.repeats + 1):
            for size, job in jobs.items():
                for process in job:
                    process.start()
                taken[size].append(sum(process.seconds() for process in job))
    ratios = sorted(many / one for one, many in zip(taken[1][1:], taken[world][1:], strict=True))
    one, many = (statistics.median(taken[size][1:]) for size in (1, world))
    print(
        f"{norm}: {many * 1000:,.0f} CPU ms a step on {world} processes, {one * 1000:,.0f} on one; ratio "
        f"{statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] (wanted at most {FLOOR:g}; "
        f"{options.image_size} px, batch {options.batch_size})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", choices=("sync", "lane_group", "frozen"), default=["sync"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64, help="tiles of a step, over all processes")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps, after one that warms up")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    for norm in options.norms:
        compare(norm, options)


if __name__ == "__main__":
    main()
