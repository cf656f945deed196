"""A Zenodo on loopback: a record, its archives, and whatever a network does to them on the way."""

from __future__ import annotations

import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RECORD = "/api/records/1214456"


def zipped(files: Mapping[str, bytes]) -> bytes:
    """A zip archive."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Zenodo:
    """Serves ``archives`` by name.

    Attributes:
        ranges: whether it knows Range.
        cuts: for each request of an archive in turn, after how many bytes the connection drops; None: never.
        busy: statuses that the next requests are answered with.
        spoilt: archives whose last byte comes wrong.
        asked: the Range header of every request of an archive, "" where there was none.
    """

    def __init__(self, archives: Mapping[str, bytes]) -> None:
        self.archives = dict(archives)
        self.ranges = True
        self.cuts: list[int | None] = []
        self.busy: list[int] = []
        self.spoilt: set[str] = set()
        self.asked: list[str] = []
        self.told_md5: dict[str, str] = {}
        self.url = ""

    @property
    def record_url(self) -> str:
        return self.url + RECORD

    def record(self) -> bytes:
        """Its JSON, of the fields that Zenodo's has for files."""
        files = [
            {
                "key": name,
                "size": len(content),
                "checksum": f"md5:{self.told_md5.get(name) or hashlib.md5(content).hexdigest()}",
                "links": {"self": f"{self.record_url}/files/{name}/content"},
            }
            for name, content in self.archives.items()
        ]
        return json.dumps({"id": 1214456, "files": files}).encode()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.busy:
            request.send_error(self.busy.pop(0))
            return
        name = request.path.removeprefix(f"{RECORD}/files/").removesuffix("/content")
        if request.path == RECORD:
            self._send(request, 200, self.record(), None)
        elif name in self.archives:
            self._send_archive(request, name)
        else:
            request.send_error(404)

    def _send_archive(self, request: BaseHTTPRequestHandler, name: str) -> None:
        content = self.archives[name]
        if name in self.spoilt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        asked = request.headers.get("Range", "")
        self.asked.append(asked)
        cut = self.cuts.pop(0) if self.cuts else None
        start = int(asked.removeprefix("bytes=").removesuffix("-") or 0) if self.ranges else 0
        if start >= len(content):
            request.send_error(416)
            return
        whole = f"bytes {start}-{len(content) - 1}/{len(content)}"
        headers = {"Content-Range": whole} if asked and self.ranges else {}
        self._send(request, 206 if headers else 200, content[start:], cut, headers)

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, body: bytes, cut: int | None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        request.send_response(status)
        for header, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            request.send_header(header, value)
        request.end_headers()
        request.wfile.write(body if cut is None else body[:cut])
        request.wfile.flush()
        request.close_connection = True


@contextmanager
def serving(archives: Mapping[str, bytes]) -> Iterator[Zenodo]:
    """The server, on a port of its own, for as long as the block runs."""
    zenodo = Zenodo(archives)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            zenodo.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    zenodo.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield zenodo
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
