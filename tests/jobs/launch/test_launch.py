"""``ca2cl launch``: exit codes come back, signals go on. Its processes here are small scripts: pre-training under it is
in ``tests/jobs/pretrain/test_preemption.py``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ca2cl.cli import main
from ca2cl.cli.launch import _age
from tests.support.forked import Forked, ca2cl
from tests.support.jobs import ROOT
from tests.support.ports import free_port

ENDS = """
import os, signal, sys
how = int(sys.argv[1])
if os.environ.get("RANK", "1") == "1":  # the other one is ended by the launcher, or ends well
    os.kill(os.getpid(), -how) if how < 0 else sys.exit(how)
"""
LISTENS = """
import os, signal, sys, time
from pathlib import Path
folder, deaf, busy = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
received = []
time.sleep(deaf)
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, _: received.append(number))
rank = os.environ["RANK"]
(folder / f"ready-{rank}").touch()
while not received:
    time.sleep(0.05)
time.sleep(busy)
(folder / f"received-{rank}.new").write_text(signal.Signals(received[0]).name)
(folder / f"received-{rank}.new").rename(folder / f"received-{rank}")
sys.exit(85)
"""


class Launcher:
    """``ca2cl launch`` of a script; ``by_command``, it is a launcher to those who read command lines."""

    def __init__(
        self, folder: Path, script: str, *arguments: str, processes: int = 2, by_command: bool = False
    ) -> None:
        (folder / "script.py").write_text(script)
        words = ["launch", "--num_machines", "1", "--mixed_precision", "no"]
        words += ["--dynamo_backend", "no", "--num_processes", str(processes)]
        words += ["--multi_gpu", "--main_process_port", str(free_port())] if processes > 1 else []
        words += [str(folder / "script.py"), *arguments]
        self.folder = folder
        self.process: Forked | subprocess.Popen[str]
        if by_command:
            env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "ca2cl", *words]
            self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
        else:
            self.process = Forked(folder, *words)

    def end(self) -> tuple[int, str]:
        """Exit code and what it told."""
        _, told = self.process.communicate(timeout=120)
        return self.process.wait(), told

    def until(self, names: list[str]) -> None:
        deadline = time.monotonic() + 100
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.05)

    def received(self) -> list[str]:
        return [path.read_text() for path in sorted(self.folder.glob("received-?"))]


@pytest.fixture
def started(tmp_path: Path) -> Iterator[list[Launcher]]:
    """Launchers that are ended with the test."""
    launchers: list[Launcher] = []
    yield launchers
    for one in launchers:
        one.process.kill()


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("how", "code"), [(0, 0), (2, 2), (85, 85), (-signal.SIGKILL, 137)])
def test_the_exit_code_is_the_processes_own(
    started: list[Launcher], tmp_path: Path, how: int, code: int, processes: int
) -> None:
    started.append(Launcher(tmp_path, ENDS, str(int(how)), processes=processes))
    found, told = started[0].end()
    assert found == code, told
    assert "Traceback" not in told and ("SIGKILL; out of memory?" in told) == (code == 137), told


@pytest.mark.parametrize(
    ("sent", "expected"), [(signal.SIGUSR1, "SIGUSR1"), (signal.SIGHUP, "SIGTERM"), (signal.SIGINT, "SIGINT")]
)
def test_a_signal_reaches_every_process(
    started: list[Launcher], tmp_path: Path, sent: signal.Signals, expected: str
) -> None:
    started.append(Launcher(tmp_path, LISTENS, str(tmp_path), "0", "0.5"))
    started[0].until(["ready-0", "ready-1"])
    started[0].process.send_signal(sent)
    code, told = started[0].end()
    assert code == 85, told
    assert started[0].received() == [expected, expected]


@pytest.mark.parametrize("children", [0, 2])
def test_a_signal_waits_for_processes_that_are_still_starting(
    started: list[Launcher], tmp_path: Path, children: int
) -> None:
    """After the launcher listens itself, at once; and when its processes are there but do not listen yet."""
    started.append(Launcher(tmp_path, LISTENS, str(tmp_path), "3", "1"))
    launcher = psutil.Process(started[0].process.pid)
    _until_it_listens(launcher.pid)
    while len(launcher.children()) < children:
        time.sleep(0.02)
    started[0].process.send_signal(signal.SIGTERM)
    code, told = started[0].end()
    assert code == 85, told
    assert started[0].received() == ["SIGTERM", "SIGTERM"]


def test_processes_are_told_when_their_launcher_is_gone(started: list[Launcher], tmp_path: Path) -> None:
    script = "from ca2cl.runtime.signals import end_with_launcher\nend_with_launcher()\n" + LISTENS
    started.append(Launcher(tmp_path, script, str(tmp_path), "0", "0", by_command=True))
    started[0].until(["ready-0", "ready-1"])
    started[0].process.kill()
    started[0].end()
    deadline = time.monotonic() + 100
    while started[0].received() != ["SIGTERM", "SIGTERM"]:
        assert time.monotonic() < deadline, started[0].received()
        time.sleep(0.05)


def test_a_machine_that_waits_for_the_first_one_can_be_stopped(tmp_path: Path) -> None:
    words = ["launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "4", "--machine_rank", "1"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    waits = Forked(tmp_path, *words, "--mixed_precision", "no", "--dynamo_backend", "no", "script.py")
    try:
        _until_it_listens(waits.pid)
        time.sleep(3)  # (it has imported everything)
        waits.send_signal(signal.SIGTERM)
        assert waits.wait(timeout=100) == 85
    finally:
        waits.kill()


def test_machines_that_do_not_meet_are_one_line(tmp_path: Path) -> None:
    port = free_port()
    words = ["launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "4", "--machine_rank", "1"]
    words += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--rdzv_conf", "timeout=2"]
    done = ca2cl(tmp_path, *words, "--mixed_precision", "no", "--dynamo_backend", "no", "script.py")
    assert done.returncode == 1
    assert f"did not meet at 127.0.0.1:{port}" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_processes_have_as_long_as_they_need(started: list[Launcher], tmp_path: Path) -> None:
    """Torch's own launcher kills them after 30 s."""
    started.append(Launcher(tmp_path, LISTENS, str(tmp_path), "0", "40"))
    started[0].until(["ready-0", "ready-1"])
    started[0].process.send_signal(signal.SIGTERM)
    code, told = started[0].end()
    assert code == 85, told
    assert started[0].received() == ["SIGTERM", "SIGTERM"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_procs", "2", "x.py"), "--num_procs"),
        (("--config_file", "nowhere.yaml", "x.py"), "nowhere.yaml"),
        (("--num_processes", "2"), "training_script"),
    ],
)
def test_bad_usage_is_one_line(arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: ") and message in line, line


def _until_it_listens(pid: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        caught = int(next(line for line in status.splitlines() if line.startswith("SigCgt")).split()[1], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)
    raise AssertionError("it never took over SIGTERM")


def test_a_processes_age_does_not_follow_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        time.sleep(0.3)
        monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that was set back
        assert 0.2 <= _age(child.pid) < 60
    finally:
        child.kill()
        child.wait()
    assert _age(child.pid) >= 20  # gone: nothing to wait for
