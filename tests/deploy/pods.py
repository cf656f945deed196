"""The pods' very command as processes of this machine: `bash tests/deploy/kubernetes.sh` runs it.

Two pods of one CPU process each. Each sees a hosts file of its own, so that the first pod's name appears when it would
in a cluster. Written otherwise than in the pod are paths, the port, and the job's size.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.deploy.kubernetes import FOLDER, build, exit_codes
from tests.support.jobs import ROOT, make_shards, training_lines
from tests.support.ports import free_port

STEPS = 12
WITH_HOSTS = 'mount --bind "$HOSTS" /etc/hosts && exec "$@"'


class Cluster:
    """The Job's pods and their names."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hosts = folder, folder / "hosts"
        self.spec = next(part for part in build(FOLDER / "job") if part["kind"] == "Job")["spec"]
        self.pod = self.spec["template"]["spec"]
        self.forget_names()

    def forget_names(self) -> None:
        shutil.copyfile("/etc/hosts", self.hosts)  # the same file, written anew: it may be mounted

    def name_first(self) -> None:
        """The first pod has an address."""
        with self.hosts.open("a") as hosts:
            hosts.write(f"127.0.0.1 pretrain-0.{self.pod['subdomain']}\n")

    def start(self, index: int, port: int, *arguments: str) -> subprocess.Popen[str]:
        (container,) = self.pod["containers"]
        script = container["command"][2].replace("/opt/ca2cl", str(ROOT)).replace("29500", str(port))
        command = [*container["command"][:2], script, container["command"][3], *arguments]
        variables = {variable["name"]: variable["value"] for variable in container["env"] if "value" in variable}
        variables |= {"NODES": "2", "GPUS": "1", "JOB": "pretrain", "JOB_COMPLETION_INDEX": str(index)}
        variables |= {"HOSTS": str(self.hosts), "CUDA_VISIBLE_DEVICES": "-1", "TORCH_HOME": str(self.folder)}
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "/bin/sh", "-c", WITH_HOSTS, "pod", *command],
            cwd=self.folder, env={**os.environ, **variables, "PATH": path}, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def end(self, what: str, pods: list[subprocess.Popen[str]], wanted: int) -> None:
        """All pods end with ``wanted``, which the Job then treats as it says."""
        told = [pod.communicate(timeout=300)[1] for pod in pods]
        codes = [pod.returncode for pod in pods]
        assert codes == [wanted] * len(pods), f"{what}: {codes}\n" + "\n".join(text[-2000:] for text in told)
        action = "Complete" if wanted == 0 else exit_codes(self.spec)[wanted]
        sys.stdout.write(f"{what:60} exit codes {codes}: {action}\n")


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ca2cl-pods-") as name:
        folder = Path(name)
        cluster, run = Cluster(folder), folder / "run"
        shards = make_shards(folder, 8)
        arguments = ["--recipe=smoke", f"--data.shards={shards}", f"--run.output_dir={run}", f"--run.steps={STEPS}"]
        started: list[subprocess.Popen[str]] = []
        try:
            port = free_port()
            started.append(cluster.start(1, port, *arguments))
            time.sleep(20)  # its launcher looks for the first pod by now
            assert started[0].poll() is None, started[0].communicate()[1]
            cluster.name_first()
            started.append(cluster.start(0, port, *arguments))
            while not (run / "journal.jsonl").exists() or len(training_lines(run)) < 2:
                assert all(pod.poll() is None for pod in started), [pod.communicate()[1] for pod in started]
                time.sleep(0.2)
            started[0].send_signal(signal.SIGTERM)
            cluster.end("pod 1 alone is preempted, after it waited for the name of pod 0", started, 85)
            assert len(training_lines(run)) < STEPS
            identity = json.loads((run / "run.json").read_text())
            port = free_port()  # one that a host just left may be refused to it; pods have an address of their own
            started = [cluster.start(index, port, *arguments) for index in (0, 1)]
            cluster.end("both made again", started, 0)
            assert [line["step"] for line in training_lines(run)] == list(range(1, STEPS + 1))
            assert json.loads((run / "run.json").read_text())["run_id"] == identity["run_id"]
            port = free_port()
            started = [cluster.start(index, port, *arguments, "--data.shards=none") for index in (0, 1)]
            cluster.end("shards that are not there", started, 2)
        finally:
            for pod in (pod for pod in started if pod.poll() is None):  # its ranks too, as the node would
                for process in [*psutil.Process(pod.pid).children(recursive=True), pod]:
                    process.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
