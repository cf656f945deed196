"""Real stores of remote shards on loopback: an HTTP server with faults on order, S3 by moto, and Google's."""

from __future__ import annotations

import functools
import http.server
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.ports import free_port

BUCKET = "tiles"


class FaultyHandler(http.server.BaseHTTPRequestHandler):
    """Serves files, also in part; ``fault(name)`` says what goes wrong with a request.

    error: 503; later: 503 with Retry-After; denied: 403; hang: no answer for ``patience`` seconds; cut: the connection
    ends within the body; short: the same, with a Content-Length that agrees; stall: silence within the body; flip: a
    wrong byte.
    """

    folder = Path()
    ranges = True
    requests: list[str] = []
    starts: list[tuple[str, int]] = []
    fault: Callable[[str], str] = staticmethod(lambda name: "")
    patience = 2.0

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        name = path.rsplit("/", 1)[-1]
        file = self.folder / path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        fault = ""
        if body:
            self.requests.append(name)
            fault = self.fault(name)
        if fault in ("error", "later", "denied"):
            self.send_response(403 if fault == "denied" else 503)
            self.send_header("Content-Length", "0")
            if fault == "later":
                self.send_header("Retry-After", "1")
            self.end_headers()
        elif fault == "hang":
            time.sleep(self.patience)
            self.close_connection = True
        else:
            self._send(name, file.read_bytes(), fault, body)

    def _send(self, name: str, data: bytes, fault: str, body: bool) -> None:
        whole = len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.ranges else None
        first, last = (int(asked[1]), min(int(asked[2] or whole - 1), whole - 1)) if asked else (0, whole - 1)
        if fault == "flip":
            data = data[:600] + bytes([data[600] ^ 1]) + data[601:]
        data = data[first : last + 1]
        sent = random.Random(f"{name} {len(self.requests)}").randrange(len(data) // 4, len(data))
        if fault == "short":
            data = data[:sent]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(data)))
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
        self.end_headers()
        if not body:
            return
        self.starts.append((name, first))
        self.wfile.write(data[:sent] if fault in ("cut", "stall") else data)
        if fault == "stall":
            self.wfile.flush()
            time.sleep(self.patience)
        self.close_connection = fault in ("cut", "stall")

    def log_message(self, *_: object) -> None:
        pass


def in_turn(faults: Mapping[str, list[str]]) -> Callable[[str], str]:
    """For each file's name the faults of its first requests."""
    return lambda name: faults[name].pop(0) if faults.get(name) else ""


def by_chance(seed: int, kinds: list[str], most: int = 3) -> Callable[[str], str]:
    """Faults of ``kinds`` for two requests of three for a tar, but no more than ``most`` for each."""
    chance, met = random.Random(seed), Counter[str]()

    def fault(name: str) -> str:
        if not name.endswith(".tar") or met[name] >= most or chance.random() < 1 / 3:
            return ""
        met[name] += 1
        return chance.choice(kinds)

    return fault


@contextmanager
def http_store(folder: Path, **settings: Any) -> Iterator[tuple[str, type[FaultyHandler]]]:
    """An HTTP server of ``folder``: its URL, and the handler, whose attributes are its settings."""
    settings = {"folder": folder, "requests": [], "starts": [], **settings}
    if "fault" in settings:
        settings["fault"] = staticmethod(settings["fault"])
    handler = type("Fresh", (FaultyHandler,), settings)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    serve = functools.partial(server.serve_forever, poll_interval=0.02)
    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", handler
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def s3_store() -> Iterator[dict[str, str]]:
    """moto's S3 server with an empty bucket: the environment that a client of it needs."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


@contextmanager
def gs_store() -> Iterator[dict[str, str]]:
    """The same for Google's storage, by a server that speaks its JSON interface."""
    from gcp_storage_emulator.server import create_server

    port = free_port()
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    environment = {
        "STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # or gcsfs asks by gRPC, for a minute, what sort of bucket it is
    }
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        yield environment
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.stop()


def upload(folder: Path, url: str) -> str:
    """Copy a folder's files to a store; returns ``url``."""
    from fsspec.core import url_to_fs

    store, path = url_to_fs(url, skip_instance_cache=True)  # one of another test's server has the same arguments
    for file in sorted(folder.iterdir()):
        if file.is_file():
            store.put_file(str(file), f"{path}/{file.name}")
    return url
