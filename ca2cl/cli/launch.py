"""``ca2cl launch``: accelerate's launcher with the job's exit code and signals.

``accelerate launch`` ends with 1 whatever its processes ended with, so that no scheduler can tell a preempted job (85)
from a broken one; it dies of SIGUSR1, and gives SIGTERM's receivers 30 s. Here the launcher's own work is done in a
thread, which leaves the signals to us.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from ca2cl.errors import InputError
from ca2cl.runtime.signals import EXIT_INTERRUPTED, EXIT_PREEMPTED, LAUNCHER

logger = logging.getLogger(__name__)
_PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGINT,
    signal.SIGHUP: signal.SIGTERM,  # the connection that the job was started through is gone
}
_PATIENCE_S = 20.0
"""Age at which a process is signalled even if it has no handler."""
_ALONE_S = 5.0
"""Seconds after a signal that processes which are just being started may take to appear."""
_FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}
"""Records each rank's last collectives, written when one times out (pytorch#88000 and accelerate#3861: a time-out
without a clue). TORCH_NCCL_DEBUG_INFO_TEMP_FILE says where to."""
_HELP = """usage: ca2cl launch [--config_file FILE] [--num_processes N] [FLAG ...] -m ca2cl VERB ...

Start the processes of a job: `accelerate launch`, with its flags and configuration files, for schedulers.

  --config_file FILE        one of accelerate_configs/, or what `accelerate config` wrote; flags win over it
  --num_processes N         processes on all machines together
  --num_machines N          machines
  --machine_rank N          number of this machine, from 0
  --main_process_ip HOST    machine 0
  --main_process_port PORT  a free port there
  --gpu_ids ID,ID           GPUs of this machine to use; all: every one
  --cpu                     use no GPU
  --num_cpu_threads_per_process N
                            threads of each process
  --rdzv_backend c10d, --max_restarts N, --monitor_interval S
                            torchrun's rendezvous and restarts

`accelerate launch --help` lists the others. SIGTERM and SIGUSR1 reach every process, which then has as long as the
scheduler gives it; SIGHUP counts as SIGTERM. The exit code is that of the process that ended first: 0, 2 (bad input),
85 (preempted after a checkpoint: start it again), 128 + N (by signal N) or 1.

  ca2cl launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 8 -m ca2cl pretrain --recipe ...
"""


def run(arguments: Sequence[str]) -> int:
    """Start the processes that ``arguments`` (``accelerate launch``'s own) ask for, and wait for them.

    Returns:
        The exit code of the process that ended first otherwise than with 0, or 0. One that a signal ended counts as
        128 and the signal's number, as in a shell.

    Raises:
        InputError: the arguments do not fit together.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0 if arguments else 2
    signals = _Signals()
    for number in _PASSED_ON:
        signal.signal(number, signals.take)
    from accelerate.commands.launch import launch_command  # seconds

    settings = _parse(arguments)
    os.environ[LAUNCHER] = str(os.getpid())
    for name, value in _FLIGHT_RECORDER.items():
        os.environ.setdefault(name, value)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # _exit_code reports it in one line
    errors: list[BaseException] = []

    def launch() -> None:
        try:
            launch_command(settings)
        except BaseException as error:  # noqa: BLE001 - raised by the main thread
            errors.append(error)

    thread = threading.Thread(target=launch, name="ca2cl-launch", daemon=True)
    thread.start()
    started = time.monotonic()
    while thread.is_alive():
        thread.join(0.2)
        signals.pass_on()
        if signals.unheard(started):
            # at once: Python's own end aborts where a thread is inside of C, here waiting for other machines
            os._exit(EXIT_INTERRUPTED if signals.received[0] == signal.SIGINT else EXIT_PREEMPTED)
    return _exit_code(errors[0] if errors else None, f"{settings.main_process_ip}:{settings.main_process_port}")


def _parse(arguments: Sequence[str]) -> Any:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.prog = "ca2cl launch"

    def refuse(message: str) -> None:
        raise InputError(f"{message}; see ca2cl launch --help")

    parser.error = refuse
    settings = parser.parse_args(list(arguments))
    if settings.config_file is not None:
        settings.config_file = str(Path(settings.config_file).expanduser())
    if settings.config_file is not None and not Path(settings.config_file).is_file():
        raise InputError(
            f"config_file {settings.config_file!r} is not there; accelerate_configs/ has one for each setup"
        )
    return settings


class _Signals:
    """Signals that came, and how many of them each process was sent."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._first = 0.0
        self._sent: dict[int, int] = {}

    def take(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or time.monotonic()
        self.received.append(_PASSED_ON[signal.Signals(number)])

    def unheard(self, started: float) -> bool:
        """True where no process was there to be sent one for some seconds, since the launcher ``started`` its work:
        this machine still waits for the others."""
        alone = time.monotonic() - max(self._first, started)
        return bool(self.received) and not self._sent and alone > _ALONE_S

    def pass_on(self) -> None:
        """Every signal once to every child: to one that is still starting when it listens, or it would just die."""
        if not self.received:
            return
        for child in psutil.Process().children():
            sent = self._sent.get(child.pid, 0)
            for number in self.received[sent:]:
                with suppress(psutil.Error):
                    if not _catches(child.pid, number) and _age(child.pid) < _PATIENCE_S:
                        break
                    child.send_signal(number)
                    sent += 1
            self._sent[child.pid] = sent


def _age(pid: int) -> float:
    """Seconds since a process was started, whatever the machine's clock was set to since."""
    with suppress(OSError):
        started = int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")
    return _PATIENCE_S


def _catches(pid: int, number: int) -> bool:
    """True if a process has a handler for a signal."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("SigCgt"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def _exit_code(error: BaseException | None, where: str) -> int:
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if error is None:
        return 0
    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        return _shell_code(failure.exitcode, f"rank {rank}")
    if isinstance(error, subprocess.CalledProcessError):
        return _shell_code(error.returncode, "the process")
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, (ValueError, OSError)):  # flags that do not fit together, a port in use
        raise InputError(str(error)) from None
    if isinstance(error, DistError):
        logger.error("ca2cl launch: the machines did not meet at %s: %s", where, " ".join(str(error).split())[:300])
        return 1
    raise error


def _shell_code(code: int, who: str) -> int:
    """The exit code as a shell has it; logs the signal that ended a process, which cannot have done so itself."""
    if code >= 0:
        return code
    name = signal.Signals(-code).name
    hint = "; out of memory? see the kernel's log, and the scheduler's limits" if name == "SIGKILL" else ""
    hint = "; a full /dev/shm? give the container more shared memory" if name == "SIGBUS" else hint
    logger.error("ca2cl launch: %s was ended by %s%s", who, name, hint)
    return 128 - code
