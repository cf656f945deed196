"""The stop flag by itself: there from a job's first moments, and a second signal that ends even what C holds up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.jobs import ROOT
from tests.support.ports import free_port

# a minute inside of C, without Python's lock, as a collective is that waits for a rank which is gone
HELD = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000_000)"


def start(code: str) -> subprocess.Popen[str]:
    """Python that has taken over the signals, which it tells by a line."""
    head = "import sys, os, time; from ca2cl.runtime.signals import StopFlag; stop = StopFlag().install(); "
    told = "sys.stdout.write('ready\\n'); sys.stdout.flush()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", head + told + code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_a_second_signal_ends_at_once_what_c_holds_up() -> None:
    process = start(HELD)
    try:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)  # the same, passed on by a launcher
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.wait(timeout=60) == 128 + signal.SIGUSR1
    finally:
        process.kill()


def test_the_flag_is_raised_and_a_job_that_is_over_is_not_ended() -> None:
    process = start("while not stop.raised: time.sleep(0.01)\nstop.over()\ntime.sleep(4)\nsys.exit(85)")
    process.send_signal(signal.SIGTERM)
    time.sleep(2.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 85


@pytest.mark.slow
def test_a_signal_ends_the_wait_for_processes_that_never_come(tmp_path: Path) -> None:
    """A process of two, whose other one is not there; 20 s after the signal."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "ca2cl", "pretrain", "--recipe", "smoke", "--data.shards", "x", "--run.output_dir", "y"],
        cwd=tmp_path, env={**os.environ, **alone, "MASTER_PORT": str(free_port()), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        time.sleep(15)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=40) == 85
    finally:
        process.kill()


def test_a_flag_that_was_installed_early_is_the_jobs() -> None:
    process = start("while not stop.raised: time.sleep(0.01)\nsys.exit(7 if StopFlag().install().raised else 1)")
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 7


def test_a_forked_workers_signals_are_its_own() -> None:
    """Twice a signal for a child, more than two seconds apart: the parent does not take them for its own."""
    code = (
        "import signal\n"
        "for _ in range(2):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.2); os._exit(0)\n"
        "    os.waitpid(child, 0); time.sleep(2.3)\n"
        "sys.exit(9 if not stop.raised else 1)"
    )
    assert start(code).wait(timeout=60) == 9


def test_a_command_knows_of_a_signal_while_it_still_imports(tmp_path: Path) -> None:
    """It then ends by its own reasons (bad input, here), and not by the signal."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ca2cl", "pretrain", "--run.bach_size", "3"], cwd=tmp_path, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    status = Path(f"/proc/{process.pid}/status")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=240) == 2
