"""docker/compose.yaml's three services as processes of this machine, by the commands that their containers run."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml

from tests.support.ports import free_port
from tests.support.servers import Process

DOCKER = Path(__file__).parents[2] / "docker"
DATABASES = ("mlflow", "mlflow_auth")


class Service(Process):
    """A server that is ended as Compose ends one: told to, and waited for."""

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(60)


class Postgres:
    """A cluster of its own; PostgreSQL refuses to run as root, so then as Debian's user for it."""

    def __init__(self, folder: Path, password: Path) -> None:
        self.folder, self.port = folder / "postgres", free_port()
        newest = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
        self.programs = newest[-1] if newest else Path(str(shutil.which("initdb"))).parent
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        self.environment = {**os.environ, "PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow"}
        self.environment["PGPASSWORD"] = password.read_text()
        self.folder.mkdir()
        known = self.folder / "password"
        shutil.copyfile(password, known)
        if self.user:
            shutil.chown(self.folder, "postgres")
            shutil.chown(known, "postgres")
        self._as_owner("initdb", "--pgdata=data", "--username=mlflow", f"--pwfile={known}", "--auth=scram-sha-256")

    def _as_owner(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.programs / program), *arguments]
        subprocess.run(command, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)

    def start(self) -> None:
        log = (self.folder / "log").open("ab")
        command = [*self.user, str(self.programs / "postgres"), "-D", "data", "-p", str(self.port)]
        command += ["-h", "127.0.0.1", "-k", str(self.folder)]
        self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        for _ in range(300):
            if subprocess.run([self.programs / "pg_isready", "-q"], env=self.environment, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def run(self, program: str, *arguments: str) -> None:
        """One of PostgreSQL's programs, as a client with a password."""
        command = [str(self.programs / program), *arguments]
        subprocess.run(command, env=self.environment, check=True, stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # "fast": clients that are left are sent away
        self.process.wait(60)


def store(folder: Path, secrets: Path) -> tuple[Service, str]:
    """SeaweedFS by Compose's command, on free ports; and its address."""
    command = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]["seaweedfs"]["command"]
    folder.mkdir()
    changed = {"/data": str(folder / "data"), "/run/secrets": str(secrets), "0.0.0.0": "127.0.0.1"}
    (folder / "data").mkdir()
    for theirs, ours in changed.items():
        assert any(theirs in word for word in command), f"compose.yaml's command has no {theirs} any more"
        command = [word.replace(theirs, ours) for word in command]
    port = free_port()
    for part in ("master", "volume", "filer", "admin", "s3"):
        command += [f"-{part}.port={port if part == 's3' else free_port()}", f"-{part}.port.grpc={free_port()}"]
    program = str(Path(sys.executable).parent / "weed")
    return Service([program, *command], folder, f"http://127.0.0.1:{port}/healthz", {}), f"http://127.0.0.1:{port}"


def tracking(folder: Path, secrets: Path, postgres: Postgres, store_uri: str, name: str, port: int) -> Service:
    """MLflow by its container's command."""
    folder.mkdir(exist_ok=True)
    settings = {
        "SECRETS": str(secrets), "HOST": "127.0.0.1", "PORT": str(port), "TRACKING_NAME": name,
        "PGHOST": "127.0.0.1", "PGPORT": str(postgres.port), "PGUSER": "mlflow", "MLFLOW_S3_ENDPOINT_URL": store_uri,
        # the script says `python3`, as in the container
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return Service(["sh", str(DOCKER / "mlflow-server.sh")], folder, f"http://127.0.0.1:{port}/health", settings)
