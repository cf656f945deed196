"""A real Slurm on this machine: munge, one controller, two nodes. For ``tests.deploy.slurm``.

Debian: ``apt-get install slurmctld slurmd slurm-client munge``. Needs root, for slurmd starts steps as their owner.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.jobs import ROOT
from tests.support.ports import free_port

NODES = ("d1", "d2")
CONF = """
ClusterName=ca2cl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
# more CPUs than the machine may have, so that a job of two processes a node starts on any
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes={names} Default=YES State=UP MaxTime=INFINITE
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=1000 State=UNKNOWN"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue")


class Cluster:
    """Slurm's daemons, for a ``with`` statement: they end with it."""

    def __init__(self, folder: Path) -> None:
        missing = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
        if missing or os.geteuid() != 0:
            raise SystemExit(f"needs root and slurmctld, slurmd, slurm-client, munge; missing: {missing}")
        self.folder = folder
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        nodes = "\n".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
        text = CONF.format(folder=folder, host=host, port=free_port(), nodes=nodes, names=",".join(NODES))
        (folder / "slurm.conf").write_text(text)
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
            f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed",
        )  # fmt: skip
        time.sleep(1)
        self._daemon("slurmctld", "-D")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until_idle()

    def __exit__(self, *_: object) -> None:
        with suppress(SystemExit, FileNotFoundError):  # jobs outlive the daemons
            self.run(["scancel", "--user=root"])
            deadline = time.monotonic() + 30
            while self.run(["squeue", "--noheader"]) and time.monotonic() < deadline:
                time.sleep(0.5)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=30)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, command: Sequence[str], **environment: str) -> str:
        """What a command of Slurm prints.

        Raises:
            SystemExit: it fails.
        """
        done = subprocess.run(
            list(command), cwd=ROOT, env={**self.env, **environment}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """The controller's words about a job: JobState, ExitCode, Restarts, ..."""
        words = self.run(["scontrol", "show", "job", number]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("ab") as log:
            self._daemons.append(subprocess.Popen(command, env=self.env, stdout=log, stderr=log))

    def _until_idle(self) -> None:
        deadline, told = time.monotonic() + 60, ""
        while time.monotonic() < deadline:
            told = subprocess.run(
                ["sinfo", "--noheader", "--Node", "--format", "%N %T"],
                env=self.env, capture_output=True, text=True, check=False,
            ).stdout  # fmt: skip
            if sorted(told.splitlines()) == [f"{node} idle" for node in NODES]:
                return
            time.sleep(0.5)
        raise SystemExit(f"Slurm did not start: {told!r}; see the logs in {self.folder}")
