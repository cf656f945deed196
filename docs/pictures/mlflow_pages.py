"""Take pictures of MLflow's pages on an embedded store: runs, run, metrics, model, version, data set.

python docs/pictures/mlflow_pages.py ca2cl-quickstart/ca2cl-runs pictures
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from browser import open_tab
from mlflow import MlflowClient

MODEL = "ca2cl-encoder"
TRAINING = "?workflowType=machine_learning"
"""Begin with runs and models, where MLflow 3 would begin with language models."""
NO_ASSISTANT = """
localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true');
localStorage.setItem('mlflow.assistant.panelOpen_v1', 'false')
"""
WIDTH = 1400


class Picture(NamedTuple):
    """One page, the texts that it must show, and the text to click before the picture is taken."""

    name: str
    address: str
    height: int
    texts: tuple[str, ...]
    click: str = ""
    then: str = ""


def pictures(client: MlflowClient) -> list[Picture]:
    """The pages of a store that has a registered encoder and an evaluation of it."""
    version = max(client.search_model_versions(f"name = '{MODEL}'"), key=lambda one: int(one.version))
    training = client.get_run(version.run_id)
    experiment = training.info.experiment_id
    made_of = f"tags.`ca2cl.source_run_id` = '{version.run_id}'"
    evaluation = next(iter(client.search_runs([experiment], made_of)), None)
    runs = f"/experiments/{experiment}/runs"
    run, name = f"{runs}/{version.run_id}", training.info.run_name
    data = training.inputs.dataset_inputs[0].dataset
    found = [
        Picture("runs", runs + TRAINING, 460, (name, "Dataset")),
        Picture("run", run + TRAINING, 1100, (name, "Logged models", "pyfunc", "pre-training of a", data.digest)),
        Picture("metrics", f"{run}/model-metrics{TRAINING}", 1000, ("loss",)),
        Picture("dataset", run + TRAINING, 800, (name,), f"{data.name} ({data.digest})", "Data details for"),
        Picture("artifacts", f"{run}/artifacts{TRAINING}", 700, ("config.yaml",)),
        Picture("model", f"/models/{MODEL}{TRAINING}", 700, (MODEL, f"Version {version.version}")),
        Picture("version", f"/models/{MODEL}/versions/{version.version}{TRAINING}", 1000, ("ca2cl.load_encoder",)),
    ]
    if evaluation is not None:
        address = f"{runs}/{evaluation.info.run_id}{TRAINING}"
        found.append(Picture("evaluation", address, 1100, (evaluation.info.run_name, "Datasets")))
    return found


@contextmanager
def server(uri: str) -> Iterator[str]:
    """MLflow's pages of a store at a free port of this machine; yields their address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("mlflow", "server", "--backend-store-uri", uri, "--port", str(port), "--workers", "1")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    started = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        while not _answers(port):
            if started.poll() is not None:
                raise RuntimeError(f"`{' '.join(command)}` ended with code {started.returncode}")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGTERM)  # with its worker
        started.wait(30)


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
        return True
    return False


async def take(address: str, wanted: list[Picture], out: Path) -> list[Path]:
    """Write ``mlflow-NAME.png`` for every page."""
    taken = []
    async with open_tab() as tab:
        await tab.show(f"{address}/#/experiments{TRAINING}", (WIDTH, 700), ("Experiments",))
        await tab.evaluate(NO_ASSISTANT)
        for one in wanted:
            await tab.show(f"{address}/#{one.address}", (WIDTH, one.height), one.texts)
            if one.click:
                await tab.click(one.click)
                await tab.wait_for(one.then)
            taken.append(out / f"mlflow-{one.name}.png")
            await tab.save(taken[-1])
    return taken


def main(root: str, out: str) -> list[Path]:
    """Take all pictures of the store in the folder ``root``."""
    Path(out).mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{Path(root).resolve() / 'mlflow.db'}"
    with server(uri) as address:
        return asyncio.run(take(address, pictures(MlflowClient(uri)), Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:3])
