"""Train an encoder whose optimizer does not fit one process, under a memory limit for each process.

    python -m benchmarks.sharded [--arch timm:vit_so150m_patch16_reg4_gap_256] [--processes 4] [--limit_gb 2.2]

Every process gets the limit by ``RLIMIT_DATA`` (``ulimit -d``). It counts what a process has reserved for its own
writing: heap and private mappings, touched or not, and no shared libraries or files that are only read. It needs no
rights, and an allocation beyond it fails in that process. A limit on addresses (``ulimit -v``) would mostly count
CUDA's libraries. About .75 GB of the default limit are reserved and never used: their data, and stacks of threads.

A line for each job: DistributedDataParallel as ``ca2cl pretrain`` would start it, and without the estimate that refuses
it; FSDP2 up to a checkpoint, and on from it. Peaks are the largest of all processes, read from ``/proc`` every 20 ms:
``VmData``, which the limit is compared with, and ``RssAnon``, the memory in use. Baseline: the same steps by one
process without a limit (``--reference``).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.jobs import CONFIGS, write_shards
from ca2cl.models.backbone import outline

_UNCHECKED = """
import runpy
from ca2cl.pretrain import run
run.check_memory = lambda *_, **__: None
runpy.run_module("ca2cl", run_name="__main__")
"""


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


def report(name: str, options: argparse.Namespace, out: Path, *more: str, **how: Any) -> bool:
    """Run a job and print its line; whether it ended well."""
    started = time.monotonic()
    code, told, peak = pretrain(options, out, *more, **how)
    seconds, cpu = time.monotonic() - started, sum(peak.cpu_seconds.values())
    peaks = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(peak.bytes.items()))
    say(f"{name}: exit {code}, peaks {peaks}, {seconds:.0f} s, {cpu:.0f} CPU s")
    if code:
        lines = [line for line in told.splitlines() if "error" in line.lower() and "ChildFailed" not in line]
        say(f"    {lines[0].strip()[:300] if lines else told[-300:]}")
    return code == 0


def losses(out: Path) -> list[float]:
    """Those of the journal, by step."""
    lines = [json.loads(line) for line in (out / "journal.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "step" in line]


def say(line: str) -> None:
    """Print at once."""
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="timm:vit_so150m_patch16_reg4_gap_256")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="half before the checkpoint, half after")
    parser.add_argument("--limit_gb", type=float, default=2.2, help="of each process")
    parser.add_argument("--reference", action="store_true", help="also one process without a limit")
    options = parser.parse_args()
    weights = 4 * sum(p.numel() for p in outline(options.arch, image_size=options.image_size).parameters())
    say(
        f"{options.arch}: weights {weights / 1e9:.2f} GB, gradients as much, AdamW's state {2 * weights / 1e9:.2f} GB; "
        f"{options.processes} processes of {options.limit_gb} GB each"
    )
    half, whole = ["--run.steps", str(options.steps // 2)], ["--run.steps", str(options.steps)]
    limited: dict[str, Any] = {"processes": options.processes, "limit": int(options.limit_gb * 1e9)}
    fsdp = ["--run.fsdp", "true"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):
            write_shards(folder)
        report("DistributedDataParallel", options, folder / "refused", *whole, **limited)
        report("DistributedDataParallel, unchecked", options, folder / "died", *whole, **limited, checked=False)
        out = folder / "sharded"
        if not report("FSDP2", options, out, *half, *fsdp, **limited):
            raise SystemExit(1)
        checkpoint = next((out / "checkpoints").glob("step-*"))
        sizes = {file.name: f"{file.stat().st_size / 1e9:.2f} GB" for file in checkpoint.glob("*.safetensors")}
        say(f"    checkpoint: {sizes}")
        if not report("FSDP2, resumed", options, out, *whole, *fsdp, **limited):
            raise SystemExit(1)
        say(f"    losses: {losses(out)}")
        if options.reference:
            report("one process, no limit", options, folder / "one", *whole, processes=1, limit=None)
            say(f"    losses: {losses(folder / 'one')}")


if __name__ == "__main__":
    main()
