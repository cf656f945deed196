"""Real MLflow servers on loopback, in sessions of their own so that ending one ends nothing else."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_KEPT: deque[socket.socket] = deque(maxlen=200)
"""Sockets of the last ports; by then the servers of earlier ones have ended."""


def free_port() -> int:
    """A port that only a server which was told of it can take, as long as this process lives.

    The socket stays bound: no other process is given the port, for a server or a connection, before the server that it
    is for has started. One that sets SO_REUSEADDR may listen there, and all of ours do.
    """
    kept = socket.socket()
    kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    kept.bind(("127.0.0.1", 0))
    _KEPT.append(kept)
    return int(kept.getsockname()[1])


class Process:
    """A server process: started, waited for, and ended with all that it started."""

    def __init__(self, command: Sequence[str], folder: Path, health: str, changes: Mapping[str, str]) -> None:
        self.command, self.folder, self.health, self.changes = command, folder, health, changes

    def start(self, patience: float = 300) -> None:
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            self.command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=self.folder,
            env={**os.environ, **self.changes},
        )
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.health, timeout=1):
                    return
            except (urllib.error.URLError, OSError):
                if self.process.poll() is not None:
                    raise AssertionError(self.told()) from None
                time.sleep(0.1)
        self.stop()
        raise AssertionError(f"the server did not start: {self.told()}")

    def told(self) -> str:
        return (self.folder / "server.log").read_text()[-2000:]

    def stop(self) -> None:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self.process.pid, 9)  # its own session: the workers that it started, and nothing else
        self.process.wait()


class Server(Process):
    """A tracking server that can be stopped and started again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        # (five more processes, for evaluating language models)
        super().__init__(command, folder, f"{self.uri}/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


class ModelServer(Process):
    """``mlflow models serve``: the encoder behind HTTP."""

    def __init__(self, folder: Path, model: str, store_uri: str) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "--env-manager", "local"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        # it starts uvicorn by name: the environment's programs must be on the path, as in an activated one
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        super().__init__(command, folder, f"{self.uri}/ping", {"MLFLOW_TRACKING_URI": store_uri, "PATH": path})
