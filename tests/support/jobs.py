"""Real jobs for the tests: made-up tissue, shards of it, and processes started as a user starts them."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from ca2cl.data.shards.config import ShardConfig
from ca2cl.data.shards.run import run as run_shard
from ca2cl.data.synthetic.tissue import write_tissue
from tests.support.forked import ca2cl, start_ranks
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]


def make_shards(folder: Path, tiles_per_class: int, seed: int = 0, size: int = 48) -> Path:
    """Shards of made-up tissue in nine classes."""
    tissue = write_tissue(folder / f"tissue-{seed}", tiles_per_class, size=size, seed=seed)
    out = folder / f"shards-{seed}"
    run_shard(ShardConfig(source=str(tissue), out=str(out), samples_per_shard=20, workers=1))
    return out


def start(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with the package importable and one thread a process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    env.pop("MLFLOW_TRACKING_URI", None)
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def as_printed(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the documents in ``folder``, beside the launcher configurations, as a user would: without the
    variables that the test run sets."""
    ours = ("OMP_", "MKL_", "CUDA_", "ACCELERATE_", "MLFLOW_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env |= {"PYTHONPATH": str(ROOT), "PATH": path, "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    (folder / CONFIGS.name).exists() or (folder / CONFIGS.name).symlink_to(CONFIGS)
    words = shlex.split(command)
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
CONFIGS = ROOT / "accelerate_configs"


def pretrain(
    folder: Path, *arguments: str, processes: int = 1, config: str | None = None
) -> subprocess.CompletedProcess[str]:
    """``ca2cl pretrain`` on CPU processes, with the variables that a shipped configuration gives them or none."""
    environment = {}
    if config is not None:
        words = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes), "-m", "ca2cl"]
        found = environment_of(words)[1].items()
        environment = {name: value for name, value in found if name.startswith("ACCELERATE_")}
    return ca2cl(folder, "pretrain", *arguments, processes=processes, **environment)


def environment_of(arguments: list[str]) -> tuple[int, dict[str, str]]:
    """The number of processes that ``accelerate launch`` starts on a machine, and their variables."""
    args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(arguments))
    args.main_process_port = free_port()
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
        return 1, environment
    return int(args.nproc_per_node), environment


def training_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The journal's training lines."""
    lines = [json.loads(line) for line in (run_dir / "journal.jsonl").read_text().splitlines()]
    return [line for line in lines if "step" in line]


class Ranks:
    """``ca2cl pretrain`` on ``processes`` CPU processes without a launcher, so that each one's end is its own.

    A launcher ends the others when one has ended, and tells exit code 1 of them all.
    """

    def __init__(self, folder: Path, *arguments: str, processes: int) -> None:
        self.started = start_ranks(folder, "pretrain", *arguments, processes=processes)

    def wait(self, seconds: float = 300) -> list[tuple[int, str]]:
        """Exit code and stderr of each; one that hangs fails the test and is ended."""
        try:
            told = [process.communicate(timeout=seconds)[1] for process in self.started]
        finally:
            for process in self.started:
                process.kill()
        return [(process.wait(), text) for process, text in zip(self.started, told, strict=True)]
