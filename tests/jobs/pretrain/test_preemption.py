"""Signals to one rank of a real job of two gloo processes, in each of its phases: 85, a checkpoint, KILLED in MLflow,
and a next start that ends with the weights of a job that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from ca2cl.store.open import Store, open_store
from ca2cl.tracking.run_record import read_run
from tests.support.jobs import LAUNCH, ROOT, make_shards, training_lines
from tests.support.ports import free_port

STEPS = 12
SETTINGS = ("--recipe", "smoke", "--run.steps", str(STEPS), "--run.checkpoint_every", "3", "--run.figures_every", "0")
FIGURES = ("--run.figures_every", "1")
PREEMPTED, DONE = [85, 85], [0, 0]


class Job:
    """A job's folder, and the two processes of its last start."""

    def __init__(self, folder: Path, shards: Path, root: Path) -> None:
        self.folder, self.run_dir, self.root = folder, folder / "run", root
        self.arguments = ["-m", "ca2cl", "pretrain", *SETTINGS, "--data.shards", str(shards), "--run.output_dir", "run"]
        self.arguments += ["--tracking.root", str(root), "--tracking.register_as", "null"]
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.env.pop("MLFLOW_TRACKING_URI", None)

    def start(self, *more: str) -> Job:
        self.started = time.time()
        port = str(free_port())
        self.ranks = []
        for rank in range(2):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            env = {**self.env, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            with (self.folder / f"rank{rank}.log").open("ab") as log:
                command = [sys.executable, *self.arguments, *more]
                self.ranks.append(subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log))
        return self

    def wait(self) -> list[int]:
        """Exit codes; a job that does not end is ended, and the test with it."""
        try:
            return [process.wait(timeout=600) for process in self.ranks]
        finally:
            for process in self.ranks:
                process.kill()

    def until(self, seen: Callable[[Job], bool]) -> None:
        deadline = time.monotonic() + 600
        while not seen(self):
            assert time.monotonic() < deadline and all(process.poll() is None for process in self.ranks), self.told()
            time.sleep(0.001)

    def told(self) -> str:
        return "".join((self.folder / f"rank{rank}.log").read_text()[-3000:] for rank in range(2))

    @property
    def store(self) -> Store:
        return open_store(root=self.root)

    @property
    def status(self) -> str:
        return str(self.store.client.get_run(read_run(self.run_dir).run_id).info.status)

    def steps(self) -> list[int]:
        return [line["step"] for line in training_lines(self.run_dir)]


def catches(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has taken over SIGTERM."""
    line = next(one for one in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in one)
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def starting(job: Job) -> bool:
    return all(map(catches, job.ranks))


def trained(steps: int) -> Callable[[Job], bool]:
    return lambda job: (job.run_dir / "journal.jsonl").exists() and job.steps()[-1:] >= [steps]


def drawing(job: Job) -> bool:
    """Rank 0 has drawn the curves in this start, and draws the clusters now."""
    path = job.run_dir / "figures" / "curves.png"
    return path.exists() and path.stat().st_mtime > job.started


def writing(job: Job) -> bool:
    return any((job.run_dir / "checkpoints").glob(".step-*.tmp"))


def ending(job: Job) -> bool:
    return (job.run_dir / "encoder").exists()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp() / "tracking-tests"  # shared: making one takes seconds


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("preemption"), 10)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path, root: Path) -> Path:
    job = Job(tmp_path_factory.mktemp("undisturbed"), shards, root).start()
    assert job.wait() == DONE, job.told()
    return job.run_dir


@pytest.fixture
def job(tmp_path: Path, shards: Path, root: Path) -> Job:
    return Job(tmp_path, shards, root)


def check_preempted(job: Job) -> None:
    assert job.wait() == PREEMPTED, job.told()
    assert (job.run_dir / "checkpoints" / "latest").exists() and job.status == "KILLED"


def check_finished(job: Job, undisturbed: Path) -> None:
    """One run, every step once, and the weights of the job that was left alone, to the last bit."""
    assert job.steps() == list(range(1, STEPS + 1)) and job.status == "FINISHED"
    history = job.store.client.get_metric_history(read_run(job.run_dir).run_id, "loss")
    assert sorted({point.step for point in history}) == job.steps()
    name = Path("checkpoints") / f"step-{STEPS:09d}" / "model.safetensors"
    expected, found = load_file(undisturbed / name), load_file(job.run_dir / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.slow
def test_a_job_that_is_stopped_while_it_starts_and_trains_ends_as_if_it_had_not_been(
    job: Job, undisturbed: Path
) -> None:
    job.start().until(starting)
    job.ranks[1].send_signal(signal.SIGTERM)
    check_preempted(job)
    assert job.steps() == [1]

    job.start("--data.workers", "1").until(trained(4))
    job.ranks[1].send_signal(signal.SIGUSR1)
    check_preempted(job)
    assert 4 <= job.steps()[-1] < STEPS

    job.start().until(trained(job.steps()[-1] + 1))
    job.ranks[0].send_signal(signal.SIGSTOP)  # the other one waits for it, inside of a collective
    time.sleep(3)
    job.ranks[1].send_signal(signal.SIGTERM)
    time.sleep(3)
    assert job.ranks[1].poll() is None
    job.ranks[1].send_signal(signal.SIGTERM)
    assert job.ranks[1].wait(timeout=5) == 128 + signal.SIGTERM
    job.ranks[0].kill()
    job.wait()

    assert job.start().wait() == DONE, job.told()
    check_finished(job, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", [drawing, writing])
def test_a_signal_while_rank_0_draws_or_writes(
    job: Job, undisturbed: Path, phase: Callable[[Job], bool], rank: int
) -> None:
    job.start(*FIGURES).until(phase)
    job.ranks[rank].send_signal(signal.SIGTERM)
    check_preempted(job)
    assert job.start().wait() == DONE, job.told()
    check_finished(job, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_after_the_last_step_lets_the_job_finish(job: Job, undisturbed: Path, rank: int) -> None:
    job.start().until(ending)
    job.ranks[rank].send_signal(signal.SIGTERM)
    assert job.wait() == DONE, job.told()
    check_finished(job, undisturbed)


@pytest.mark.slow
def test_signals_at_any_instant(job: Job, undisturbed: Path) -> None:
    draw = random.Random(int(time.time()))
    codes: list[int] = []
    for _ in range(20):
        job.start(*FIGURES).until(starting)
        time.sleep(draw.uniform(0, 30))
        for process in draw.sample(job.ranks, draw.choice([1, 2])):
            process.send_signal(draw.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes = job.wait()
        assert codes in (PREEMPTED, DONE), job.told()
        if codes == DONE:
            break
    assert codes == DONE or job.start().wait() == DONE
    check_finished(job, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "rank"])
def test_under_the_launcher(job: Job, undisturbed: Path, whom: str) -> None:
    """The launcher reports 1 for a rank's 85; signalled itself it passes the signal on and waits."""
    launch = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    with (job.folder / "launcher.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*launch, *job.arguments], cwd=job.folder, env=job.env, stdout=log, stderr=log, start_new_session=True
        )
    while not trained(3)(job):
        assert launcher.poll() is None, (job.folder / "launcher.log").read_text()
        time.sleep(0.05)
    children = [one for one in psutil.Process(launcher.pid).children() if "pretrain" in one.cmdline()]
    assert len(children) == 2
    (launcher if whom == "launcher" else children[1]).send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=120) == 1, (job.folder / "launcher.log").read_text()
    assert job.status == "KILLED" and job.steps()[-1] < STEPS
    assert job.start().wait() == DONE, job.told()
    check_finished(job, undisturbed)
