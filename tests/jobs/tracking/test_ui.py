"""``ca2cl ui`` shows MLflow's pages until Ctrl-C, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.request import urlopen

import psutil
import pytest

from ca2cl.store.open import open_store


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_pages_of_a_store_open_and_close(number: signal.Signals, tmp_path: Path) -> None:
    """`pytest -m slow tests/jobs/tracking/test_ui.py`: MLflow's server takes some 10 s of CPU time to start."""
    open_store(root=tmp_path / "ca2cl-runs")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (tmp_path / "below").mkdir()
    command = [sys.executable, "-m", "ca2cl", "ui", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=tmp_path / "below", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ}, text=True
    ) as pages:
        assert pages.stdout is not None and pages.stderr is not None
        assert pages.stdout.readline() == f"store:  {tmp_path / 'ca2cl-runs'}\n"
        assert pages.stdout.readline().startswith(f"pages:  http://127.0.0.1:{port}/#/experiments?workflowType=machine")
        with urlopen(f"http://127.0.0.1:{port}/") as page:
            assert b"MLflow" in page.read()
        children = psutil.Process(pages.pid).children(recursive=True)
        assert children
        pages.send_signal(number)
        assert pages.wait(30) == 0
        assert pages.stderr.read().endswith("\nended\n")
    assert not psutil.wait_procs(children, timeout=10)[1]
