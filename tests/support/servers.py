"""Real MLflow servers on loopback, in sessions of their own so that ending one ends nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from tests.support.forked import Forked
from tests.support.ports import free_port


class Process:
    """A server process: started, waited for, and ended with all that it started."""

    def __init__(self, command: Sequence[str], folder: Path, health: str, changes: Mapping[str, str]) -> None:
        self.command, self.folder, self.health, self.changes = command, folder, health, changes
        self.process: subprocess.Popen[bytes] | Forked

    def begin(self) -> None:
        """Start the process, which may not answer yet."""
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            self.command,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd=self.folder,
            env={**os.environ, **self.changes},
        )

    def start(self, patience: float = 300) -> None:
        self.begin()
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(self.health, timeout=5):
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


class MLflow(Process):
    """``mlflow COMMAND``, forked, which saves most of its start; ``fresh``, started as a user does."""

    def __init__(
        self, command: Sequence[str], folder: Path, health: str, changes: Mapping[str, str], fresh: bool = False
    ) -> None:
        self._fresh = fresh
        super().__init__([*((sys.executable, "-m", "mlflow") if fresh else ()), *command], folder, health, changes)

    def begin(self) -> None:
        if self._fresh:
            super().begin()
        else:
            self.process = Forked(self.folder, *self.command, module="tests.support.mlflow_here", **self.changes)

    def told(self) -> str:
        return self.process.stderr()[-2000:] if isinstance(self.process, Forked) else super().told()

    def stop(self) -> None:
        if self._fresh:
            super().stop()
        else:
            self.process.kill()
            self.process.wait()


class Server(MLflow):
    """A tracking server that can be stopped and started again on the same port and data."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        # (five more processes, for evaluating language models)
        super().__init__(command, folder, f"{self.uri}/health", {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


class ModelServer(MLflow):
    """``mlflow models serve``: the encoder behind HTTP."""

    def __init__(self, folder: Path, model: str, store_uri: str, fresh: bool = False) -> None:
        port = free_port()
        self.uri = f"http://127.0.0.1:{port}"
        command = ["models", "serve", "-m", model, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
        # it starts uvicorn by name: the environment's programs must be on the path, as in an activated one
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        changes = {"MLFLOW_TRACKING_URI": store_uri, "PATH": path}
        super().__init__(command, folder, f"{self.uri}/ping", changes, fresh)
