"""SIGTERM to whatever started a training, and Ctrl-C in its terminal: the training ends with a checkpoint, one line
says so, and no process is left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ca2cl.tracking.journal import read_journal
from tests.support.jobs import CONFIGS, LAUNCH, ROOT, make_shards, training_lines
from tests.support.ports import free_port

MARK = "CA2CL_TEST_JOB"
PYTHON = sys.executable
CTRL_C, TERM = signal.SIGINT, signal.SIGTERM
ONE = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
TWO = ("--multi_gpu", "--num_processes", "2", *ONE[2:])
STOPPED = "stopped by a signal after step"


def launchers(training: list[str]) -> dict[str, list[str]]:
    """Every way to start ``python`` with the arguments ``training``."""
    port = str(free_port())
    elsewhere = ["--main_process_port", port]
    zero = ["--config_file", str(CONFIGS / "deepspeed_zero2.yaml")]
    torchrun = [PYTHON, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    shell = f"{shlex.join([PYTHON, *training])}; exit $?"  # a shell that stays
    return {
        "bare": [PYTHON, *training],
        "accelerate": [*LAUNCH, *ONE, *training],
        "accelerate-shell": [*LAUNCH, *ONE, "--no_python", "sh", "-c", shell],
        "accelerate-2": [*LAUNCH, *TWO, *elsewhere, *training],
        "torchrun-2": [*torchrun, *training],
        "ca2cl-launch": [PYTHON, "-m", "ca2cl", "launch", *ONE, *training],
        "ca2cl-launch-2": [PYTHON, "-m", "ca2cl", "launch", *TWO, *elsewhere, *training],
        "zero2": [PYTHON, "-m", "ca2cl", "launch", *zero, "--num_processes", "2", *ONE[2:], *elsewhere, *training],
    }


class Started:
    """A long training in a process group of its own, by one of the launchers."""

    def __init__(self, how: str, folder: Path, shards: Path, *more: str) -> None:
        self.run_dir, self.log, self.mark = folder / "run", folder / "log", uuid.uuid4().hex
        settings = ["--recipe", "smoke", "--run.steps", "100000", "--run.checkpoint_every", "100000"]
        settings += ["--run.figures_every", "0", "--data.shards", str(shards), "--run.output_dir", str(self.run_dir)]
        settings += ["--tracking.root", str(folder / "runs"), "--tracking.register_as", "null", *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: self.mark}
        if how == "zero2":
            env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
        env.pop("MLFLOW_TRACKING_URI", None)
        command = launchers(["-m", "ca2cl", "pretrain", *settings])[how]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def until_it_trains(self, steps: int = 2) -> None:
        deadline = time.monotonic() + 240
        while not self.steps() >= steps:
            assert self.process.poll() is None and time.monotonic() < deadline, self.told()
            time.sleep(0.05)

    def send(self, number: signal.Signals) -> None:
        """SIGTERM to the launcher alone, SIGINT to its group, as a terminal does."""
        os.killpg(self.process.pid, number) if number == CTRL_C else self.process.send_signal(number)

    def until_none_is_left(self, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while (left := self.left()) or self.process.poll() is None:
            assert time.monotonic() < deadline, (left, self.told())
            time.sleep(0.1)

    def left(self) -> list[psutil.Process]:
        """Its processes, whatever group or session they are in."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def steps(self) -> int:
        journal = self.run_dir / "journal.jsonl"
        return max((line["step"] for line in training_lines(self.run_dir)), default=0) if journal.exists() else 0

    def told(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("launchers"), 10)


@pytest.fixture
def started() -> Iterator[list[Started]]:
    """Jobs that are ended with the test."""
    jobs: list[Started] = []
    yield jobs
    for job in jobs:
        for process in job.left():
            process.kill()


def check_kept(job: Started) -> None:
    """A checkpoint of the last step, KILLED, one line when the signal came and one of what was kept."""
    told = job.told()
    latest = (job.run_dir / "checkpoints" / "latest").read_text().strip()
    assert latest == f"step-{job.steps():09d}", told
    journal = read_journal(job.run_dir / "journal.jsonl")
    states = [line["status"] for line, _ in journal if line.get("event") == "status"]
    assert states[-1] == "KILLED", told
    assert told.count("stopping after this step with a checkpoint") == 1, told
    assert told.count(STOPPED) == 1, told


SLOW = pytest.mark.slow
ALL = [
    pytest.param("bare", CTRL_C, 130),
    pytest.param("accelerate", TERM, None),
    pytest.param("bare", TERM, 85, marks=SLOW),
    pytest.param("accelerate", CTRL_C, None, marks=SLOW),
    *(pytest.param(how, number, None, marks=SLOW) for how in ("accelerate-shell", "accelerate-2", "torchrun-2")
      for number in (TERM, CTRL_C)),
    *(pytest.param(how, number, code, marks=SLOW) for how in ("ca2cl-launch", "ca2cl-launch-2")
      for number, code in ((TERM, 85), (CTRL_C, 130))),
]  # fmt: skip


@pytest.mark.parametrize(("how", "number", "code"), ALL)
def test_the_first_signal_keeps_a_checkpoint(
    how: str, number: signal.Signals, code: int | None, started: list[Started], tmp_path: Path, shards: Path
) -> None:
    job = Started(how, tmp_path, shards)
    started.append(job)
    job.until_it_trains()
    job.send(number)
    job.until_none_is_left()
    check_kept(job)
    if code is not None:  # the other launchers have codes of their own
        assert job.process.returncode == code and "Traceback" not in job.told(), job.told()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["bare", "ca2cl-launch-2", "zero2"])
def test_a_signal_to_one_rank_ends_a_step_between_its_micro_batches(
    how: str, started: list[Started], tmp_path: Path, shards: Path
) -> None:
    """All ranks leave the step together, and the one before is what is kept."""
    if how == "zero2":
        pytest.importorskip("deepspeed")
    job = Started(
        how, tmp_path, shards, "--model.norm", "frozen", "--run.batch_size", "88", "--run.micro_batch_size", "2"
    )
    started.append(job)
    job.until_it_trains(1)
    done = job.steps()
    ranks = [process for process in job.left() if "pretrain" in process.cmdline() and "launch" not in process.cmdline()]
    ranks[-1].send_signal(TERM)
    job.until_none_is_left(120)
    assert job.process.returncode == 85 and job.steps() == done, job.told()
    assert (job.run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{done:09d}"
    assert "Traceback" not in job.told() and job.told().count(STOPPED) == 1, job.told()
