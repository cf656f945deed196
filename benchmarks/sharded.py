"""Train an encoder whose optimizer does not fit one process, under a memory limit for each process.

    python -m benchmarks.sharded [--arch timm:vit_so150m_patch16_reg4_gap_256] [--processes 4] [--limit_gb 1.9]

Every process gets the limit by ``RLIMIT_DATA`` (``ulimit -d``). It counts what a process has reserved for its own
writing: heap and private mappings, touched or not, and no shared libraries or files that are only read. It needs no
rights, and an allocation beyond it fails in that process. A limit on addresses (``ulimit -v``) would mostly count
CUDA's libraries.

The table has a row for each job: DistributedDataParallel as ``ca2cl pretrain`` would start it, and without the estimate
that refuses it; FSDP2 for ``--steps`` steps with a checkpoint in the middle, and again from that checkpoint. Peaks are
the largest of all processes, read from ``/proc`` every 20 ms: ``VmData``, which the limit is compared with, and
``RssAnon``, the memory in use. Baseline: the same steps by one process without a limit (``--reference``).
"""

from __future__ import annotations

import argparse
import os
import resource
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.jobs import CONFIGS

_UNCHECKED = (
    "import sys; from ca2cl.pretrain import run; run.check_memory = lambda *_, **__: None; sys.argv[0] = 'ca2cl'; "
    "from ca2cl.cli.main import main; sys.exit(main())"
)


@dataclass
class Peak:
    """Largest values of any process of a job."""

    bytes: dict[str, int] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)

    def look(self, launcher: int) -> None:
        """Read them."""
        try:
            found = psutil.Process(launcher).children(recursive=True)
        except psutil.Error:
            return
        for process in found:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii").splitlines()
                times = process.cpu_times()
            except (OSError, psutil.Error):
                continue
            self.cpu_seconds[process.pid] = times.user + times.system
            for name, value in (line.split(":") for line in lines if line.startswith(("VmData", "RssAnon"))):
                self.bytes[name] = max(self.bytes.get(name, 0), int(value.split()[0]) * 1024)


def pretrain(
    options: argparse.Namespace, out: Path, *more: str, processes: int, limit: int | None, checked: bool = True
) -> tuple[int, str, Peak]:
    """Run a job; its exit code, its stderr and its peak."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (out.parent / "unchecked.py").write_text(_UNCHECKED, encoding="utf-8")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "cpu.yaml"),
        "--num_processes", str(processes), "--main_process_port", str(port), "--dynamo_backend", "no",
        *(["-m", "ca2cl"] if checked else [str(out.parent / "unchecked.py")]),
        "pretrain", "--data.shards", str(out.parent / "shards"), "--data.image_size", str(options.image_size),
        "--data.lanes", str(options.batch), "--data.workers", "0", "--views.recipe", "crop",
        "--model.arch", options.arch, "--objective.clusters", "4", "--objective.epsilon", "0.1",
        "--objective.epsilon_mode", "relative", "--optim.name", "adamw", "--optim.lr", "1e-5", "--optim.schedule",
        "constant", "--run.batch_size", str(options.batch), "--run.output_dir", str(out), "--run.figures_every", "0",
        "--run.checkpoint_every", str(options.steps // 2), "--tracking.root", str(out.parent / "store"),
        "--tracking.register_as", "null", *more,
    ]  # fmt: skip
    if processes == 1:
        command = [sys.executable, *command[command.index("-m", 3) :]]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "-1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(CONFIGS.parent),
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    peak, told = Peak(), out.parent / "stderr"

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    with told.open("w") as stderr:
        job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=stderr, preexec_fn=limited)
        while job.poll() is None:
            peak.look(job.pid if processes > 1 else os.getpid())
            time.sleep(0.02)
    return job.returncode, told.read_text(encoding="utf-8", errors="replace"), peak
