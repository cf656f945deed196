"""A small job on two processes, disturbed until it is done, and beside it the same job left alone.

    python -m tests.chaos [--rounds 30] [--seed 0] [--elastic] [--arch resnet18] [--steps N] [--folder FOLDER]
                          [SETTINGS OF ca2cl pretrain]

Every round starts the job (or goes on with it), does one thing to it at a random instant, and waits until all of its
processes are gone: a signal (KILL, TERM, USR1, INT) to one rank, to all, or to the launcher; MLflow's server away and
back; the newest checkpoint damaged before the start; with --elastic another number of processes. In the end the job is
let finish, and compared with the other one: weights (bit for bit, or with --elastic to 1e-5), the journal (every step
once, in order, with the same losses), MLflow (one run, every metric of every step once). Exit code 0 when all holds.

A body whose steps are quick needs more of them, or the job is done before it was disturbed often.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from ca2cl.tracking.journal import watch_lines
from ca2cl.training.checkpoint import DamagedCheckpoint, verify
from tests.support.jobs import ROOT, make_shards, training_lines
from tests.support.ports import free_port
from tests.support.servers import Server

STEPS, ELASTIC_STEPS = 160, 80
PATIENCE, WHOLE = 180.0, 3600.0  # seconds that a disturbed job may take to end, and an undisturbed one
JOB = (
    "--recipe", "smoke", "--run.checkpoint_every", "5", "--run.batch_size", "16",
    "--optim.lr", "0.001", "--tracking.register_as", "null", "--run.figures_every", "0",
)  # fmt: skip
# `bitwise`, because in `exact` rounding errors grow on another number of processes (docs/reproducibility.md).
ELASTIC = (
    "--run.batch_size", "32", "--run.accumulation", "bitwise",
    "--model.norm", "lane_group", "--model.norm_group", "2",
)  # fmt: skip
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Job:
    """The job in its folder: started, disturbed, waited for."""

    def __init__(self, folder: Path, shards: Path, server: Server, steps: int, settings: Sequence[str]) -> None:
        self.folder, self.shards, self.server, self.total = folder, shards, server, steps
        self.settings = (*settings, "--run.steps", str(steps))  # behind the recipe, whose own steps they replace
        self.run = folder / "run"
        folder.mkdir()

    def start(self, processes: int) -> subprocess.Popen[bytes]:
        """``ca2cl launch``, which gives every rank a session of its own."""
        launch = [sys.executable, "-m", "ca2cl", "launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no"]
        launch += ["--num_processes", str(processes), "--main_process_port", str(free_port())]
        launch += ["--multi_gpu"] if processes > 1 else []
        verb = ["-m", "ca2cl", "pretrain", *self.settings, "--data.shards", str(self.shards)]
        verb += ["--run.output_dir", str(self.run)]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"MLFLOW_TRACKING_URI": self.server.uri, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
        log = (self.folder / "job.log").open("ab")
        return subprocess.Popen([*launch, *verb], cwd=self.folder, env=env, stdout=log, stderr=log)

    def wait(self, job: subprocess.Popen[bytes], patience: float = PATIENCE) -> int:
        """Its exit code, when every process of it is gone.

        Raises:
            AssertionError: some are still there after so many seconds.
        """
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            if job.poll() is not None and not self.ranks():
                return int(job.returncode)
            time.sleep(0.1)
        job.kill()
        for rank in self.ranks():
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        raise AssertionError(f"a job hangs; see {self.folder / 'job.log'}")

    def ranks(self) -> list[int]:
        """Processes of the job but the launcher: ranks, and what they started."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            words = process.info["cmdline"] or []
            if str(self.run) in words and "launch" not in words and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        return sorted(found)

    def steps(self) -> int:
        """Steps in the journal."""
        with suppress(OSError, ValueError):
            return max((line["step"] for line in training_lines(self.run)), default=0)
        return 0

    def newest_of_two(self) -> Path | None:
        """The newest checkpoint, where it is whole and there is another one to go back to."""
        there = sorted((self.run / "checkpoints").glob("step-*"))
        with suppress(DamagedCheckpoint):
            if len(there) > 1:
                verify(there[-1])
                return there[-1]
        return None


def disturb(draw: random.Random, job: Job, running: subprocess.Popen[bytes], seen: Counter[str]) -> None:
    """One signal, at a random instant of the job's life."""
    time.sleep(draw.uniform(0.5, 25.0))
    number, ranks = draw.choice(SIGNALS), job.ranks()
    target = draw.choice(("rank", "rank", "all", "launcher"))
    if not ranks:
        target = "launcher"  # it has started none yet; nobody signalled would leave a long job to its end
    victims = {"rank": ranks and [draw.choice(ranks)], "all": [*ranks, running.pid], "launcher": [running.pid]}
    for victim in victims[target]:
        with suppress(ProcessLookupError):
            os.kill(victim, number)
    seen[f"{number.name} to {target}"] += 1


def damage(draw: random.Random, checkpoint: Path) -> None:
    """One of a checkpoint's files: cut, a bit flipped, or gone."""
    path = draw.choice(sorted(checkpoint.iterdir()))
    kind, data = draw.choice(("cut", "flip", "gone")), bytearray(path.read_bytes())
    if kind == "gone":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data))])
    else:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)


def one_round(draw: random.Random, job: Job, seen: Counter[str], elastic: bool) -> None:
    """Start, disturb, wait."""
    newest = job.newest_of_two()
    if newest is not None and draw.random() < 0.3:
        damage(draw, newest)
        seen["checkpoint damaged"] += 1
    away = draw.random() < 0.3
    running = job.start(draw.choice((1, 2, 4)) if elastic else 2)
    if away:
        time.sleep(draw.uniform(0, 15))
        job.server.stop()
        seen["MLflow away"] += 1
    disturb(draw, job, running, seen)
    seen[f"exit code {job.wait(running)}"] += 1
    if away:
        job.server.start()


def finish(job: Job) -> None:
    """Let the job end, and MLflow have everything."""
    for _ in range(3):  # a last signal may have left a checkpoint and nothing else
        if job.wait(job.start(2), WHOLE) == 0:
            break
    else:
        raise AssertionError(f"the job does not finish; see {job.folder / 'job.log'}")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": job.server.uri}
    subprocess.run([sys.executable, "-m", "ca2cl", "sync", str(job.run)], env=env, check=True, capture_output=True)


def faults(job: Job, alone: Job, elastic: bool) -> list[str]:
    """What is not as in the job that was left alone."""
    found = []
    mine, theirs = (load_file(one.run / "encoder" / "encoder.safetensors") for one in (job, alone))
    far = max(float((mine[name].float() - theirs[name].float()).abs().max()) for name in theirs)
    scale = max(float(value.float().abs().max()) for value in theirs.values())
    if far > (1e-5 * scale if elastic else 0.0):
        found.append(f"weights differ by {far:.2e} (largest is {scale:.2e})")
    lines, expected = training_lines(job.run), training_lines(alone.run)
    if [line["step"] for line in lines] != list(range(1, job.total + 1)):
        found.append("the journal has gaps or double lines")
    off = [a["step"] for a, b in zip(lines, expected, strict=False) if abs(a["loss"] - b["loss"]) > 1e-5 * elastic]
    if off:
        found.append(f"losses differ from step {off[0]} on, {len(off)} of them")
    if looks(job) != looks(alone):
        found.append("the watch lines differ")
    best = [one.run / "best" / "encoder.safetensors" for one in (job, alone)]
    if best[1].exists() and not elastic and best[0].read_bytes() != best[1].read_bytes():
        found.append("the best encoders differ")
    return found + mlflow_faults(job)


def looks(job: Job) -> list[dict[str, Any]]:
    """The watch lines, if ``--watch.shards`` is among the settings, without their times; numbers to 1e-4."""
    lines = watch_lines(job.run / "journal.jsonl")
    own = [{name: line[name] for name in line if name not in ("time", "watch/seconds")} for line in lines]
    return [{k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()} for line in own]


def mlflow_faults(job: Job) -> list[str]:
    """What MLflow has not, or has twice."""
    client = MlflowClient(job.server.uri)
    run_id = json.loads((job.run / "run.json").read_text())["run_id"]
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()])
    same = [run.info.run_id for run in runs if run.data.params.get("run.output_dir") == str(job.run)]
    found = [] if same == [run_id] else [f"MLflow has {len(same)} runs of the job"]
    if client.get_run(run_id).info.status != "FINISHED":
        found.append(f"the run's status is {client.get_run(run_id).info.status}")
    looked = sorted(line["step"] for line in looks(job))
    if looked != sorted(point.step for point in client.get_metric_history(run_id, "watch/rank")):
        found.append("MLflow has other watches than the journal")
    for metric in ("loss", "lr", "grad_norm"):
        steps = [point.step for point in client.get_metric_history(run_id, metric)]
        if sorted(steps) != list(range(1, job.total + 1)):
            found.append(f"metric {metric}: {len(steps)} points, {len(set(steps))} steps of {job.total}")
    return found


def main() -> int:
    """Disturb, compare, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="1, 2 or 4 processes, drawn every round")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--steps", type=int, help=f"of the job; default: {STEPS}, with --elastic {ELASTIC_STEPS}")
    parser.add_argument("--folder", type=Path, help="a new one; default: a temporary folder")
    options, more = parser.parse_known_args()
    steps = options.steps or (ELASTIC_STEPS if options.elastic else STEPS)
    settings = (*JOB, *(ELASTIC if options.elastic else ()), "--model.arch", options.arch, *more)
    torch.set_num_threads(1)
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    draw, seen, server = random.Random(options.seed), Counter[str](), Server(folder)
    shards = make_shards(folder, tiles_per_class=40)
    server.start()
    try:
        alone, job = (Job(folder / name, shards, server, steps, settings) for name in ("alone", "disturbed"))
        finish(alone)
        for number in range(1, options.rounds + 1):
            one_round(draw, job, seen, options.elastic)
            sys.stderr.write(f"round {number} of {options.rounds}: {job.steps()} of {job.total} steps\n")
        finish(job)
        found = faults(job, alone, options.elastic)
    finally:
        server.stop()
    for what, times in sorted(seen.items()):
        sys.stdout.write(f"{times:4d}  {what}\n")
    sys.stdout.write("\n".join(["FAULTS", *found] if found else ["nothing was lost"]) + f"\n{folder}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
