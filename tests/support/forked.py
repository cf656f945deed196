"""``ca2cl`` in processes that are forked from one that has imported it: no job pays ten seconds of imports.

Each is a process of its own, with its signals, streams and exit code, and meets the others by gloo. What is left out is
Python's start and a launcher; ``tests/jobs/launch`` and ``test_two_hosts`` start jobs by those.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tests.support.ports import free_port

DEEPSPEED = "ACCELERATE_USE_DEEPSPEED"
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.support.preloaded"])


CODE = "tests.support.code"
"""The module whose arguments are those of ``python -c``."""


class Forked:
    """``python -m ca2cl ARGUMENTS`` in ``folder``, with the interface of ``subprocess.Popen``; its streams are files.

    Args:
        folder: its working directory.
        arguments: a verb and its settings.
        module: another one that is run with these arguments.
        environment: variables that it has beside the tests' own.
    """

    def __init__(self, folder: Path, *arguments: str, module: str = "ca2cl", **environment: str) -> None:
        self.args = arguments
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._streams = [Path(self._folder.name, name) for name in ("out", "err")]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        if "MLFLOW_TRACKING_URI" not in environment:
            variables.pop("MLFLOW_TRACKING_URI", None)
        streams = [*map(str, self._streams)]
        process = CONTEXT.Process(target=_become, args=(module, arguments, str(folder), variables, streams))
        process.start()
        self._process = process

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs; a signal's is negative."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All of stdout and of stderr, once it has ended."""
        self.wait(timeout)
        return self.stdout(), self.stderr()

    def stdout(self) -> str:
        """What it has written to stdout so far."""
        return _read(self._streams[0])

    def stderr(self) -> str:
        """What it has written to stderr so far."""
        return _read(self._streams[1])

    def first_line(self) -> str:
        """The first line of stdout, waited for; what there is if it ends without one."""
        while "\n" not in self.stdout() and self.poll() is None:
            time.sleep(0.02)
        return self.stdout().partition("\n")[0]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ca2cl(folder: Path, *arguments: str, processes: int = 1, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``ca2cl ARGUMENTS`` to its end on ``processes`` CPU processes.

    Returns:
        the first exit code that is not 0, and the streams of all ranks one after another.
    """
    ranks = start_ranks(folder, *arguments, processes=processes, **environment)
    try:
        told = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    code = next((rank.returncode for rank in ranks if rank.returncode), 0)
    out, err = ("".join(texts) for texts in zip(*told, strict=True))
    return subprocess.CompletedProcess(arguments, code, out, err)


def start_ranks(folder: Path, *arguments: str, processes: int = 1, **environment: str) -> list[Forked]:
    """``ca2cl ARGUMENTS`` on ``processes`` processes, told of each other as a launcher would."""
    if processes == 1 and DEEPSPEED not in environment:
        return [Forked(folder, *arguments, **environment)]
    common = {**_launched(processes), **environment}
    return [Forked(folder, *arguments, **common, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(processes)]


def on_ranks(function: Callable[..., None], processes: int, *arguments: Any) -> None:
    """Call ``function(rank, *arguments)`` on ``processes`` processes, told of each other as a launcher would.

    Raises:
        torch.multiprocessing.ProcessRaisedException: what one of them raised; the others are ended.
    """
    torch.multiprocessing.start_processes(  # type: ignore[no-untyped-call]
        _on_rank, (function, _launched(processes), arguments), nprocs=processes, start_method="forkserver"
    )


def _launched(processes: int) -> dict[str, str]:
    """The variables with which a launcher tells the processes of one machine how many they are and where they meet."""
    count = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return {**count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}


def _on_rank(rank: int, function: Callable[..., None], variables: dict[str, str], arguments: tuple[Any, ...]) -> None:
    os.environ |= {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    function(rank, *arguments)


def _become(
    module: str, arguments: tuple[str, ...], folder: str, variables: dict[str, str], streams: list[str]
) -> None:
    """Be ``python -m MODULE ARGUMENTS``."""
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    torch.set_num_threads(1)
    sys.argv = [module, *arguments]
    if DEEPSPEED in variables:
        _without_compiler()
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves without


def _without_compiler() -> None:
    """Leave out the all-reduce of DeepSpeed's inference on CPUs: it compiles for a minute, and training never calls it.

    See ``deepspeed.comm.torch.build_shm_op``.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # it would take itself for one with oneCCL
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
