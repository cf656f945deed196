"""One optimizer step of CA2CL on the CPU against the method's naive form.

    python -m benchmarks.step [--image_size 64] [--batch_size 64] [--precision bf16] [--repeats 5] [--threads 2]

Naive form: the stem's weight is perturbed in place between two backwards (L1's, which gives the direction and every
parameter's gradient, then L2's, which goes through the weak view again), contiguous memory format. Ours: the strong
view once for the direction and its part of L1's gradient, the weak view's activations for the direction, one backward
for the rest, channels_last. Both use the same losses, optimizer and autocast, and give the same gradient, which is
checked (in fp32) before anything is timed. Repeats are interleaved. Times are CPU seconds of all threads; the ratio is
the median of the rounds' ratios, in brackets their range.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ca2cl.config import ObjectiveConfig, OptimConfig
from ca2cl.methods.base import LocalEngine, ViewBatch
from ca2cl.methods.ca2cl.cluster_loss import cluster_loss, k_means
from ca2cl.methods.ca2cl.method import CA2CL
from ca2cl.methods.gather import Rows
from ca2cl.methods.nt_xent import nt_xent
from ca2cl.models.backbone import build_encoder
from ca2cl.models.batch_norm import commit_statistics
from ca2cl.models.heads import Network
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer

FLOORS = {"no": 1.25, "bf16": 1.3}
OBJECTIVE = ObjectiveConfig(epsilon=0.1, epsilon_mode="relative")


def naive_gradient(network: Network, x1: Tensor, x2: Tensor) -> None:
    """Accumulate the gradient of L1 + L2 by two backwards and a weight that is written and restored."""
    rows, config = Rows.at(torch.arange(len(x1), device=x1.device)), OBJECTIVE
    first, second = network(x1, None, 0), network(x2, None, 1)
    found1, found2 = (k_means(one.g, config.clusters, config.lloyd_iterations) for one in (first, second))
    clusters = cluster_loss(first.g, second.g, found1, found2, config.cluster_temperature)
    loss = nt_xent(first.z, second.z, rows, config.temperature) + config.cluster_weight * clusters
    loss.backward(retain_graph=True)
    weight = network.encoder.stem.weight
    assert weight.grad is not None
    delta = weight.grad * (config.epsilon * weight.detach().norm() / weight.grad.norm())
    weight.data.add_(delta)
    z_adv = network(x1).z
    nt_xent(second.z, z_adv, rows, config.temperature).backward()
    weight.data.sub_(delta)
    commit_statistics(network)


def check_equal(network: Network, x1: Tensor, x2: Tensor) -> float:
    """Largest relative difference between the two forms' gradients in fp32; the baseline must be the same method."""
    mine, naive = copy.deepcopy(network), copy.deepcopy(network)
    CA2CL(OBJECTIVE).step(LocalEngine(mine), [ViewBatch(x1, x2, torch.arange(len(x1)))])
    naive_gradient(naive, x1, x2)
    pairs = [(a.grad, b.grad) for a, b in zip(mine.parameters(), naive.parameters(), strict=True)]
    worst = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs if a is not None and b is not None)
    assert worst < 1e-2, f"the two forms differ by {worst:.1e}"
    return worst


def passes(network: Network, x1: Tensor, x2: Tensor, precision: str) -> dict[str, Callable[[], object]]:
    """One whole optimizer step of each form."""
    torch.manual_seed(0)
    config = OptimConfig(name="adamw", lr=1e-4)
    mine, naive = copy.deepcopy(network), copy.deepcopy(network)
    engine = AccelerateEngine(build_accelerator(), mine, build_optimizer(config, mine), precision)  # type: ignore[arg-type]
    method, optimizer = CA2CL(OBJECTIVE), build_optimizer(config, naive)
    last1, last2 = (x.contiguous(memory_format=torch.channels_last) for x in (x1, x2))

    def ours() -> None:
        method.step(engine, [ViewBatch(last1, last2, torch.arange(len(x1)))])
        engine.optimizer_step(config.lr, None)

    def baseline() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            naive_gradient(naive, x1, x2)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {"ours": ours, "baseline": baseline}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps, after one that warms up")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    network = Network(build_encoder(identity_blocks=True)).train()
    x1, x2 = (torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size) for _ in range(2))
    worst = check_equal(network, x1, x2)
    taken: dict[str, list[float]] = {"ours": [], "baseline": []}
    for name, one_step in [*passes(network, x1, x2, arguments.precision).items()] * (arguments.repeats + 1):
        began = time.process_time()
        one_step()
        taken[name].append(time.process_time() - began)
    seconds = {name: statistics.median(found[1:]) for name, found in taken.items()}
    ratios = sorted(there / here for here, there in zip(taken["ours"][1:], taken["baseline"][1:], strict=True))
    print(
        f"step: {seconds['ours'] * 1000:,.0f} CPU ms; two backwards, contiguous {seconds['baseline'] * 1000:,.0f}; "
        f"ratio {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] (wanted "
        f"{FLOORS[arguments.precision]:g}; {arguments.image_size} px, batch {arguments.batch_size}, "
        f"{arguments.precision}, {arguments.threads} thread(s), gradients equal to {worst:.0e})"
    )


if __name__ == "__main__":
    main()
