"""No process of a job outlives its launcher for long, even where it is held up inside of a collective."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from ca2cl.runtime.deadline import Deadline
from tests.jobs.launch.test_launchers import Started
from tests.jobs.launch.test_stop_flag import HELD, start
from tests.support.jobs import make_shards

SHORT = "from ca2cl.runtime.deadline import Deadline; stop._deadline = Deadline(0.5)\n"


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds go by."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += seconds

    return wait


def test_a_check_is_due_once_the_launcher_is_gone(now: Callable[[float], None]) -> None:
    deadline = Deadline(30)
    deadline.resume()
    now(1000)
    assert not deadline.passed()
    deadline.begin()
    now(29)
    assert not deadline.passed()
    deadline.check()
    deadline.begin()  # again, as a second launcher above it ends
    now(29)
    assert not deadline.passed()
    now(10_000)
    assert deadline.passed()


def test_where_checks_are_far_apart_it_waits_longer(now: Callable[[float], None]) -> None:
    deadline = Deadline(30)
    deadline.resume()
    for seconds in (50, 5):
        now(seconds)
        deadline.check()
    deadline.begin()
    now(99)
    assert not deadline.passed()
    now(2)
    assert deadline.passed()


def test_a_checkpoint_is_written_to_its_end(now: Callable[[float], None]) -> None:
    deadline = Deadline(30)
    deadline.begin()
    deadline.suspend()
    now(10_000)
    assert not deadline.passed()
    deadline.resume()
    now(29)
    assert not deadline.passed()
    deadline.resume()
    now(1)
    deadline.check()
    now(31)
    assert deadline.passed()  # what was suspended counts for no distance between checks


@pytest.mark.parametrize(("received", "code"), [("", 85), ("os.kill(os.getpid(), 2); ", 130)])
def test_a_process_that_c_holds_up_ends_with_the_code_of_its_signal(received: str, code: int) -> None:
    trains = f"with stop.training(): {received}time.sleep(0.1); stop.launcher_gone(); {HELD}"
    process = start(SHORT + trains)
    try:
        assert process.wait(timeout=60) == code
    finally:
        process.kill()


def test_what_is_unhurried_is_waited_for() -> None:
    process = start(SHORT + "stop.launcher_gone()\nwith stop.training(), stop.unhurried(): time.sleep(3)\nsys.exit(9)")
    assert process.wait(timeout=60) == 9


@pytest.mark.slow
@pytest.mark.parametrize("fault", [signal.SIGSTOP, signal.SIGKILL])
def test_no_process_is_left_a_minute_after_the_launcher(fault: signal.Signals, tmp_path: Path) -> None:
    """One rank stops or dies while the other one waits for it inside of a collective; then the launcher is killed. A
    stopped process cannot end itself: it does when it goes on."""
    job = Started("accelerate-2", tmp_path, make_shards(tmp_path, 10))
    try:
        job.until_it_trains()
        ranks = [one for one in job.left() if one.ppid() == job.process.pid and "pretrain" in one.cmdline()]
        victim = next(one for one in ranks if one.environ()["RANK"] == "1")
        victim.send_signal(fault)
        if fault == signal.SIGSTOP:
            time.sleep(3)
        job.process.kill()
        deadline = time.monotonic() + 60
        while [one for one in job.left() if one.status() != psutil.STATUS_STOPPED]:
            assert time.monotonic() < deadline, job.told()
            time.sleep(0.5)
        assert ("it is held up itself" in job.told()) == (fault == signal.SIGSTOP), job.told()
        if fault == signal.SIGSTOP:
            victim.send_signal(signal.SIGCONT)
        job.until_none_is_left(60)
    finally:
        for process in job.left():
            process.kill()
