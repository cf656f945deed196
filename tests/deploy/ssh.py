"""``launch/ssh.sh`` over real SSH to two network namespaces of two processes each.

    python -m tests.deploy.ssh [--folder FOLDER]          # root; minutes; see tests/deploy/hosts.py for the packages

A job is stopped by a signal to the script, started again, loses the connection to a host, is started again and ends;
then it is compared with one on four processes of this machine that was left alone. Ends with a table and 0, or with 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from tests.deploy.check import Check, distance, steps, until
from tests.deploy.hosts import Hosts
from tests.support.jobs import CONFIGS, ROOT, make_shards
from tests.support.ports import free_port

STEPS = 60


class Job:
    """The job's settings, and how it is started."""

    def __init__(self, folder: Path, hosts: Hosts, shards: Path) -> None:
        self.folder, self.hosts, self.shards, self.run = folder, hosts, shards, folder / "run"
        self.list = folder / "hosts.txt"
        self.list.write_text("# the first one is rank 0's\n" + "\n".join(hosts.addresses) + "\n")
        self.env = {
            **os.environ, "CA2CL_PROCESSES": "2", "CA2CL_VENV": sys.prefix, "CA2CL_PORT": str(free_port()),
            "CA2CL_ACCELERATE": str(CONFIGS / "cpu.yaml"), "CA2CL_SSH": f"ssh -F {hosts.config}",
            "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "eth0",  # gloo would take the address that the host's name has: one for both here
        }  # fmt: skip

    def settings(self, run: Path) -> list[str]:
        return [
            "pretrain", "--recipe", "smoke", "--data.shards", str(self.shards), "--run.output_dir", str(run),
            "--run.steps", str(STEPS), "--run.figures_every", "0", "--tracking.root", str(self.folder / "store"),
            "--tracking.register_as", "null",
        ]  # fmt: skip

    def start(self, hosts: Path | None = None) -> subprocess.Popen[bytes]:
        command = ["bash", str(ROOT / "launch" / "ssh.sh"), str(hosts or self.list), *self.settings(self.run)]
        with (self.folder / "ssh.log").open("ab") as log:
            return subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=log, stderr=log)

    def alone(self) -> Path:
        """On this machine, left alone."""
        run = self.folder / "alone"
        launch = [sys.executable, "-m", "ca2cl", "launch", "--config_file", str(CONFIGS / "cpu.yaml")]
        launch += ["--num_processes", "4", "--main_process_port", str(free_port()), "-m", "ca2cl"]
        env = {name: value for name, value in self.env.items() if name != "GLOO_SOCKET_IFNAME"}
        subprocess.run([*launch, *self.settings(run)], env=env, check=True, capture_output=True)
        return run

    def processes(self) -> int:
        """Of the job, on all hosts."""
        return sum(str(self.run) in (one.info["cmdline"] or []) for one in psutil.process_iter(["cmdline"]))


def disturb(job: Job, check: Check) -> None:
    """Stop by signal, lose a connection, name a host that is not there, end."""
    script = job.start()
    until("five steps are done", lambda: len(steps(job.run)) >= 5)
    script.send_signal(signal.SIGTERM)
    check.that("SIGTERM to the script: exit code 85", script.wait(timeout=300) == 85, script.returncode)
    done = len(steps(job.run))
    check.that("stopped before its end", 5 <= done < STEPS, f"after step {done} of {STEPS}")

    script = job.start()
    until("it goes on", lambda: len(steps(job.run)) >= done + 5)
    clients = [one for one in psutil.Process(script.pid).children() if one.name() == "ssh"]
    clients[1].kill()
    code = script.wait(timeout=300)
    check.that("a connection is lost: exit code 137, the job stops", code == 137, code)
    until("its processes are gone", lambda: job.processes() == 0, 120)
    done = len(steps(job.run))
    check.that("with a checkpoint", (job.run / "checkpoints" / f"step-{done:09d}").is_dir(), f"of step {done}")

    wrong = job.folder / "wrong.txt"
    wrong.write_text(f"{job.hosts.addresses[0]}\nno-such-host.invalid\n")
    code = job.start(wrong).wait(timeout=300)
    check.that("a host that is not there: exit code 255", code == 255, code)
    until("its processes are gone", lambda: job.processes() == 0, 120)

    code = job.start().wait(timeout=900)
    check.that("started again: exit code 0", code == 0, code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a new one; default: a temporary folder")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="ssh-"))
    folder.mkdir(parents=True, exist_ok=True)
    check = Check()
    with Hosts(folder / "hosts", 2) as hosts:
        job = Job(folder, hosts, make_shards(folder, 30))
        disturb(job, check)
    far = distance(job.run, job.alone())
    check.that("weights equal an undisturbed run's on one machine", far == 0, f"largest difference {far:.1e}")
    check.that("one journal, every step once", steps(job.run) == list(range(1, STEPS + 1)), f"{len(steps(job.run))}")
    code = check.table()
    sys.stdout.write(f"{folder}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
