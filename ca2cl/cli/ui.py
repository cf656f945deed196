"""``ca2cl ui``: MLflow's pages on a tracking store."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from subprocess import DEVNULL, Popen, TimeoutExpired
from typing import IO
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

from annotated_types import Interval

from ca2cl.common.ranges import check_ranges
from ca2cl.common.redact import redact
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.store.databases import sqlite_uri
from ca2cl.store.locate import place_of_paths
from ca2cl.store.open import ARTIFACTS, DATABASE, Store, is_server, resolve_uri
from ca2cl.store.quiet import DEFAULTS

POSITIONAL = ("run",)
_PATIENCE_S = 180.0
_LOOK_S = 0.3
_END_S = 10.0
_TRAINING = "/#/experiments?workflowType=machine_learning"
"""Page of the experiments, with runs and metrics in place of traces of language models."""
_LOCAL = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - addresses to ask at, none to listen on
_EVERYONE = "warning: any machine that reaches this one can change the store: MLflow asks nobody for a password\n"


@dataclass(frozen=True, kw_only=True)
class UiConfig:
    """Open MLflow's pages on a tracking store: runs, metrics, figures, registered encoders.

    The store is that of the run that is named, or else that of --tracking.uri, of MLFLOW_TRACKING_URI, of
    --tracking.root, of the user's configuration, or ca2cl-runs in the working directory or the nearest folder above it.
    Ctrl-C ends it.
    """

    run: str = ""
    """Folder of a run, or of an embedded store, whose pages to open."""
    port: int = 5000
    """Port of the pages."""
    host: str = "127.0.0.1"
    """Address to listen on. 127.0.0.1: this machine alone; 0.0.0.0: any machine that reaches it, without a password."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow store; only tracking.uri and tracking.root matter here."""

    def __post_init__(self) -> None:
        check_ranges(self, port=Interval(ge=1, le=65535))


def run(config: UiConfig) -> int:
    """Show the pages until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        InputError: there is no store, the port is taken, or MLflow's server is not installed or does not start.
    """
    store = find_store(config)
    if is_server(store.uri):
        sys.stdout.write(f"{store.place} is a server, whose pages are open already:\n  {store.place}{_TRAINING}\n")
        return 0
    check_port(config.host, config.port)
    if find_spec("flask") is None or find_spec("mlflow") is None:
        raise InputError("only a part of MLflow is installed, without its pages; pip install mlflow")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    host = _LOCAL.get(config.host, config.host)
    address = f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    sys.stderr.write(f"starting MLflow on {store.place} ...\n")
    with (
        tempfile.TemporaryFile("w+b") as log,
        suppress(KeyboardInterrupt),
        _serving(store, config, log) as server,
    ):
        _await(server, log, address)
        sys.stderr.write(_EVERYONE if config.host in _LOCAL else "")
        sys.stdout.write(f"store:  {store.place}\npages:  {address}{_TRAINING}\nCtrl-C ends this.\n")
        sys.stdout.flush()
        server.wait()
        raise InputError(f"MLflow's server ended ({_last_line(log)}); start it again")
    sys.stderr.write("\nended\n")
    return 0


def find_store(config: UiConfig) -> Store:
    """The store to show.

    Raises:
        InputError: there is none.
    """
    if config.run:
        if not Path(config.run).expanduser().exists():
            raise InputError(f"run {config.run!r}: not there; give a run's folder, or leave it out")
        place = place_of_paths([config.run])
        if place is None:
            raise InputError(f"run {config.run!r}: leads to no store that is there and can be written; name it by "
                             "--tracking.root FOLDER alone")  # fmt: skip
        return Store(
            place.uri or sqlite_uri(Path(place.root or "") / DATABASE), Path(place.root) if place.root else None
        )
    uri, root = resolve_uri(config.tracking.uri, config.tracking.root)
    if root is None or (root / DATABASE).exists():
        return Store(uri, root)
    relative = Path(config.tracking.root)
    above = [] if relative.is_absolute() else [folder / relative for folder in Path.cwd().parents]
    found = next((folder for folder in above if (folder / DATABASE).exists()), None)
    if found is None:
        raise InputError(
            f"no store in {root}{' or the folders above' if above else ''}; `ca2cl pretrain` makes one with its first "
            "run; name one that is elsewhere: ca2cl ui RUN_FOLDER, or --tracking.root FOLDER"
        )
    return Store(sqlite_uri(found / DATABASE), found)


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on.

    Raises:
        InputError: it is taken, not permitted, or none of this machine's.
    """
    try:
        (family, _, _, _, where), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"host is {host!r}: unknown; use 127.0.0.1, or an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port is {port}: taken on {host}; use another, such as --port {port + 1}") from None
        if error.errno == errno.EACCES:
            raise InputError(f"port is {port}: not permitted; use 1024 or more, such as --port 5000") from None
        raise InputError(f"host is {host!r}: {error.strerror}; use 127.0.0.1") from None


@contextmanager
def _serving(store: Store, config: UiConfig, log: IO[bytes]) -> Iterator[Popen[bytes]]:
    """MLflow's server as a child process, which ends with this block."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", config.host, "--port", str(config.port)]
    command += ["--workers", "1"]
    if store.root is not None:
        command += ["--default-artifact-root", (store.root / ARTIFACTS).as_uri()]
    # by the environment, for an address may hold a password, and anybody may read a command line
    environment = {**DEFAULTS, **os.environ, "MLFLOW_BACKEND_STORE_URI": store.uri}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    environment.pop("MLFLOW_TRACKING_URI", None)
    # a session of its own: Ctrl-C comes to this process alone, which ends the server and its workers
    server = Popen(command, env=environment, stdin=DEVNULL, stdout=log, stderr=log, start_new_session=True)
    try:
        yield server
    finally:
        _end(server)


def _end(server: Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(TimeoutExpired, KeyboardInterrupt):  # a second Ctrl-C does not wait
            server.wait(_END_S)
            return


def _await(server: Popen[bytes], log: IO[bytes], address: str) -> None:
    """Return once the server answers."""
    ask, end = build_opener(ProxyHandler({})), time.monotonic() + _PATIENCE_S
    while time.monotonic() < end:
        if server.poll() is not None:
            raise InputError(f"MLflow's server does not start: {_last_line(log)}")
        try:
            with ask.open(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(_LOOK_S)
    raise InputError(f"MLflow's server does not answer in {_PATIENCE_S:.0f} s: {_last_line(log)}")


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    return redact(lines[-1])[:300] if lines else "it says nothing"
