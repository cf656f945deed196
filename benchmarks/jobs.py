"""Real jobs for the benchmarks: ``accelerate launch -m ca2cl pretrain`` on CPU processes, by any engine."""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as shard
from ca2cl.data.synthetic.tissue import write_tissue

CONFIGS = Path(__file__).parent.parent / "accelerate_configs"
ENGINES = {"ddp": "cpu", "zero1": "deepspeed_zero1", "zero2": "deepspeed_zero2", "fsdp": "cpu"}
LANES = 16


@dataclass(frozen=True)
class Cell:
    """One way to share a step."""

    engine: str
    processes: int
    micro_batches: int


def write_shards(folder: Path) -> Path:
    """Shards of 720 made-up tiles of 48 px."""
    out = folder / "shards"
    shard(ShardConfig(source=str(write_tissue(folder / "tissue", 80, size=48)), out=str(out), workers=1))
    return out


def accumulation(cell: Cell, wanted: str) -> str:
    """The kind that a cell runs: FSDP2 has no ``bitwise``."""
    return "exact" if cell.engine == "fsdp" else wanted


def train(cell: Cell, out: Path, shards: Path, options: argparse.Namespace, *before: str) -> str:
    """Run one cell into the folder ``out``; returns what it printed. ``before`` is put before the command.

    Raises:
        SystemExit: with the job's own words where it fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    name = ENGINES[cell.engine] if cell.processes > 1 or cell.engine != "ddp" else "single_gpu"
    fsdp = cell.engine == "fsdp"
    command = [
        *before,
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml"),
        "--num_processes", str(cell.processes), "--main_process_port", str(port), "--dynamo_backend", "no",
        "-m", "ca2cl", "pretrain", "--data.shards", str(shards), "--data.image_size", str(options.image_size),
        "--data.lanes", str(LANES), "--data.workers", "0", "--views.recipe", "crop", "--model.arch", options.arch,
        "--model.norm", options.norm, "--model.norm_group", str(options.group),
        "--model.norm_block", str(options.block),
        "--objective.epsilon", "0.1", "--objective.epsilon_mode", "relative",
        "--optim.name", options.optimizer, "--optim.lr", str(options.lr), "--optim.schedule", "constant",
        "--run.batch_size", str(options.batch), "--run.steps", str(options.steps), "--run.output_dir", str(out),
        "--run.micro_batch_size", str(options.batch // cell.processes // cell.micro_batches),
        "--run.accumulation", accumulation(cell, options.accumulation), "--run.fsdp", str(fsdp).lower(),
        "--tracking.root", str(out.parent / "store"), "--tracking.register_as", "null",
    ]  # fmt: skip
    device = {"CUDA_VISIBLE_DEVICES": "-1", "DS_ACCELERATOR": "cpu"}
    environment = {**os.environ, **device, "OMP_NUM_THREADS": "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{cell} failed:\n{done.stderr[-3000:]}")
    return done.stdout
