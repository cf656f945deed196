"""Memory of a step: what ``ca2cl doctor --plan`` says beside what processes take.

    python -m benchmarks.memory [--archs resnet18 timm:vit_small_patch16_224] [--engines ddp zero1 zero2 fsdp]
                                [--processes 1 2] [--micro_batches 1 2] [--checkpoint false true]

Every case is a launch of gloo processes on the CPU: two steps of the method and the optimizer on made-up views, by the
engine of a real job. Measured is the peak of the resident memory over what the process had before it built the network,
on the rank that takes most, less what a tiny body takes beyond its own plan in the same launch: libraries that the
engine loads late, its kernels and its process group. Blocks of freed memory go back to the system at once (glibc's
thresholds are set for that), for on a GPU the allocator reuses them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from benchmarks.jobs import CONFIGS, ENGINES
from ca2cl.config import DataConfig, ModelConfig, ObjectiveConfig, OptimConfig, RunConfig
from ca2cl.doctor.plan.config import PlanConfig
from ca2cl.doctor.plan.run import plan
from ca2cl.methods.base import ViewBatch
from ca2cl.models.backbone import build_encoder
from ca2cl.pretrain.config import MethodConfig
from ca2cl.pretrain.engines import build_engine, configured_method
from ca2cl.runtime.accelerator import build_accelerator

SIZES, TILES = {"resnet18": 96}, {"resnet18": 32}
"""Side of the views, and tiles of each process, by body; of others 224 and 12."""
TINY = {"arch": "timm:test_vit", "size": 32, "tiles": 12, "micro_batches": 1, "checkpoint": False}


def settings(case: dict[str, Any]) -> PlanConfig:
    """The planned job of a case."""
    batch = case["tiles"] * case["processes"]
    model = ModelConfig(arch=case["arch"], norm="frozen", checkpoint_activations=case["checkpoint"])
    return PlanConfig(
        data=DataConfig(image_size=case["size"], lanes=batch), model=model,
        method=MethodConfig(name=case["method"]), objective=ObjectiveConfig(adversary=case["adversary"]),
        optim=OptimConfig(name=case["optimizer"]),
        run=RunConfig(
            batch_size=batch, micro_batch_size=case["tiles"] // case["micro_batches"], fsdp=case["engine"] == "fsdp"
        ),
        processes=case["processes"], device="cpu",
    )  # fmt: skip


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(f"{name}:"))


def work(case: dict[str, Any]) -> None:
    """Two steps; rank 0 prints the largest of all ranks' peaks."""
    torch.set_num_threads(1)
    config, accelerator = settings(case), build_accelerator()
    import timm  # noqa: F401 - before the network, whose memory is counted

    if case["engine"].startswith("zero"):
        import deepspeed  # noqa: F401
    method, rank = configured_method(config), accelerator.process_index
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew
    encoder = build_encoder(config.model.arch, config.model.norm, image_size=config.data.image_size)
    micro = config.run.micro_batch_size
    assert micro is not None
    engine = build_engine(config, accelerator, method, encoder, micro)
    del encoder
    batches = []
    for number in range(case["micro_batches"]):
        shape = (micro, 3, config.data.image_size, config.data.image_size)
        x1, x2 = (torch.randn(shape).contiguous(memory_format=torch.channels_last) for _ in range(2))
        batches.append(ViewBatch(x1, x2, rank + config.processes * torch.arange(number * micro, (number + 1) * micro)))
    for _ in range(2):
        engine.keep_buffers()
        terms = method.step(engine, batches)
        engine.optimizer_step(1e-4, None, terms["loss"])
    peak = torch.tensor(float(resident("VmHWM") - before))
    if config.processes > 1:
        dist.all_reduce(peak, dist.ReduceOp.MAX)
    if rank == 0:
        Path(case["out"]).write_text(json.dumps(float(peak)), encoding="utf-8")
    accelerator.end_training()


def measure(case: dict[str, Any]) -> float:
    """Bytes at the peak, from processes of their own.

    Raises:
        SystemExit: with the job's own words where it fails.
    """
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "peak.json"
        alone = case["processes"] == 1 and case["engine"] == "ddp"
        config = CONFIGS / f"{'single_gpu' if alone else ENGINES[case['engine']]}.yaml"
        command = [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes",
            str(case["processes"]), "--main_process_port", str(port), "--dynamo_backend", "no", "-m",
            "benchmarks.memory", "--case", json.dumps({**case, "out": str(out)}),
        ]  # fmt: skip
        at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        device = {"CUDA_VISIBLE_DEVICES": "-1", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, env={**os.environ, **at_once, **device}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{case} failed:\n{done.stderr[-3000:]}")
        return float(json.loads(out.read_text(encoding="utf-8")))


@cache
def overhead(engine: str, processes: int, **others: Any) -> float:
    """Bytes that a process takes beyond the plan, whatever its body."""
    tiny = {**TINY, **others, "engine": engine, "processes": processes}
    return measure(tiny) - estimate(tiny)


def compared(case: dict[str, Any]) -> tuple[float, float]:
    """Bytes at the peak, planned and measured."""
    others = {name: value for name, value in case.items() if name not in TINY}
    return estimate(case), measure(case) - overhead(**others)


def estimate(case: dict[str, Any]) -> float:
    """Bytes at the peak, from the plan."""
    config = settings(case)
    found = plan(config)
    steps = found.recomputed if case["checkpoint"] else found.kept
    assert steps is not None, case
    views = 2 * case["tiles"] * 3 * config.data.image_size**2 * 4  # there are no tiles here
    return found.peak(case["engine"], steps, case["tiles"] // case["micro_batches"], views)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["resnet18", "timm:vit_small_patch16_224"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["ddp", "zero1", "zero2"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--micro_batches", type=int, nargs="+", default=[1, 2], help="of a process, a step")
    parser.add_argument("--checkpoint", nargs="+", choices=("false", "true"), default=["false"])
    parser.add_argument("--method", default="ca2cl", choices=("ca2cl", "simclr"))
    parser.add_argument("--adversary", default="true", choices=("false", "true"))
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        work(options.case)
        return
    grid = itertools.product(
        options.archs, options.engines, options.processes, options.micro_batches, options.checkpoint
    )
    cells = [cell for cell in grid if not (cell[1] != "ddp" and cell[2] == 1)]
    heads = ("body", "engine", "processes", "micro-batches", "activations", "estimate, MB", "measured, MB", "ratio")
    print(f"| {' | '.join(heads)} |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for arch, engine, processes, count, checkpoint in tqdm(cells, desc="cells", disable=None):
        case = {
            "arch": arch, "engine": engine, "processes": processes, "micro_batches": count,
            "tiles": TILES.get(arch, 12), "checkpoint": checkpoint == "true", "size": SIZES.get(arch, 224),
            "method": options.method, "adversary": options.adversary == "true", "optimizer": options.optimizer,
        }  # fmt: skip
        planned, found = compared(case)
        kind = "recomputed" if case["checkpoint"] else "kept"
        print(
            f"| {arch} | {engine} | {processes} | {count} | {kind} | {planned / 1e6:.0f} | {found / 1e6:.0f} "
            f"| {planned / found:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
