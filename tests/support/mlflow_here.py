"""``mlflow ARGUMENTS``, with the web server that it would start in this process: one import of everything less."""

import os
import runpy
import shlex
import sys
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import mlflow.pyfunc.backend
import mlflow.server
from mlflow.cli import cli


def be_tracking_server(command: Sequence[str], extra_env: Mapping[str, str], **_: object) -> None:
    """Be ``python -m uvicorn ...``, which MLflow starts as another process."""
    os.environ |= extra_env
    sys.argv = list(command[2:])
    runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)


def be_model_server(command: Sequence[str], env: Mapping[str, str], **_: object) -> None:
    """Be ``bash -c 'exec uvicorn ...'``."""
    be_tracking_server(["", "", *shlex.split(command[2])[1:]], env)


if __name__ == "__main__":
    mlflow.server._exec_cmd = be_tracking_server
    mlflow.pyfunc.backend.subprocess = SimpleNamespace(Popen=be_model_server)
    cli()
