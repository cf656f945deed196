"""Real jobs for the tests: made-up tissue, shards of it, and processes started as a user starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ca2cl.data.shard import ShardConfig
from ca2cl.data.shard import run as run_shard
from ca2cl.data.synthetic import write_tissue

ROOT = Path(__file__).parent.parent


def make_shards(folder: Path, tiles_per_class: int, seed: int = 0, size: int = 48) -> Path:
    """Shards of made-up tissue in nine classes."""
    tissue = write_tissue(folder / f"tissue-{seed}", tiles_per_class, size=size, seed=seed)
    out = folder / f"shards-{seed}"
    run_shard(ShardConfig(source=str(tissue), out=str(out), samples_per_shard=20, workers=1))
    return out


def start(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with the package importable and one thread a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment}
    env.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def pretrain(folder: Path, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    """``accelerate launch -m ca2cl pretrain`` on CPU processes."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--mixed_precision", "no", "--num_machines", "1"]
    launch += ["--dynamo_backend", "no", "--num_processes", str(processes)]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            launch += ["--multi_gpu", "--main_process_port", str(free.getsockname()[1])]
    return start([*launch, "-m", "ca2cl", "pretrain", *arguments], folder)


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The journal's training lines."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]
