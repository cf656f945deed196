"""End workers with their parent, and a job with its launcher.

The kernel's own means, PR_SET_PDEATHSIG, is about the thread that forked a process and not about its process, and knows
nothing of a shell in between: so a thread looks every second.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import PurePath
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

logger = logging.getLogger(__name__)
_PARENTS = {signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1}
_EVERY_S = 1.0
_LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.accelerate_cli", "accelerate.commands.launch",
    "torchrun", "torch.distributed.run", "torch.distributed.launch", "deepspeed",
}  # fmt: skip
_OURS = {"launch", "quickstart", "study"}
_HEAD = 6
"""Words of a command line among which its program is looked for: ``python -u -m torch.distributed.run``."""


@contextmanager
def starting_workers() -> Iterator[None]:
    """Block signals in processes that are started, until they call ``begin_worker``: a signal that comes while they
    still import would print a traceback of each."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _PARENTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_worker(_number: int = 0, *, outlives_sigterm: bool = False) -> None:
    """Leave signals but SIGTERM to the parent, and end once that is gone, however it went.

    A worker of a killed parent may wait for ever otherwise: on a queue that it or another worker holds open itself.

    Args:
        outlives_sigterm: do not end by the first SIGTERM, which a scheduler sends to every process of a job: the parent
            needs its workers until it has written what it keeps.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    for number in _PARENTS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _on_sigterm if outlives_sigterm else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PARENTS)
    _in_background(partial(_outlive, parent.pid))


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _outlive(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_EVERY_S)
    os._exit(1)


@cache
def processes_can_share() -> bool:
    """True if processes can share locks and memory, which needs a writable /dev/shm. Warns once if not."""
    try:
        multiprocessing.get_context("fork").Lock()
    except OSError as error:
        logger.warning(
            "/dev/shm cannot be used (%s): no worker processes, all is done in this one; give the container shared "
            "memory (--shm-size=8g) to be faster", error.strerror,
        )  # fmt: skip
        return False
    return True


def when_launcher_ends(act: Callable[[], None]) -> None:
    """Call ``act``, in a thread, once a launcher that this process was started by is gone.

    Launchers are recognised by their command lines, from this process's parent upwards, with any shells in between. The
    environment does not suffice: `accelerate launch` of one process sets nothing that a user may not have set. A shell
    is no launcher: a job that `nohup` or `setsid` started from it goes on when it has ended.
    """
    launchers = _launchers()
    if launchers:
        _in_background(partial(_follow, launchers, act))


def _follow(launchers: Sequence[psutil.Process], act: Callable[[], None]) -> None:
    while all(map(_runs, launchers)):
        time.sleep(_EVERY_S)
    act()


def _launchers() -> list[psutil.Process]:
    import psutil

    found = []
    above = psutil.Process().parents()
    for process in above:
        try:
            command = process.cmdline()
        except psutil.Error:  # gone by now, or hidden
            continue
        if is_launcher(command):
            found.append(process)
    if not found and "TORCHELASTIC_RUN_ID" in os.environ:  # a program of its own that uses torch's launcher
        found = above[:1]
    return found


def is_launcher(command: Sequence[str]) -> bool:
    """True for a command line of accelerate's, torch's or DeepSpeed's launcher, `ca2cl launch`, quickstart or study."""
    words = [PurePath(word).name for word in command[:_HEAD]]
    ours = {after for word, after in zip(words, words[1:], strict=False) if word == "ca2cl"}
    return bool(_LAUNCHERS.intersection(words) or ours & _OURS)


def is_running(pid: int) -> bool:
    """True if there is a process of that number, and it has not ended."""
    import psutil

    try:
        return _runs(psutil.Process(pid))
    except psutil.Error:
        return False


def _runs(process: psutil.Process) -> bool:
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _in_background(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="ca2cl-lifetime", daemon=True).start()
