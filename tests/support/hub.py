"""A hub on loopback that speaks to huggingface_hub: repositories with revisions, gates, and broken transfers."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import unquote

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_token_of_a_user_who_accepted_the_terms"


@dataclass
class Repo:
    """Files of one repository. ``gated`` ones need ``TOKEN``; of ``short`` ones the last byte never comes; ``broken``
    ones break off in the middle of the first answer."""

    files: dict[str, bytes]
    gated: bool = False
    short: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    revisions: tuple[str, ...] = ("main", COMMIT)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        name, _, rest = unquote(self.path.partition("?")[0]).lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo, token = self.hub.repos.get(name), self.headers.get("Authorization")
        if repo is None:
            self._refuse(401, "RepoNotFound")
        elif repo.gated and token != f"Bearer {TOKEN}":
            self._refuse(403 if token else 401, "GatedRepo")
        elif revision not in repo.revisions:
            self._refuse(404, "RevisionNotFound")
        elif file not in repo.files:
            self._refuse(404, "EntryNotFound")
        else:
            self._send(repo, file, body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, repo: Repo, file: str, body: bool) -> None:
        data = repo.files[file]
        first = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        sent = data[first : len(data) - (file in repo.short)]
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(data)))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(sent) if body else len(data)))
        self.end_headers()
        if body and file in repo.broken:
            repo.broken.discard(file)
            sent = sent[: len(sent) // 2]
            self.close_connection = True
        if body:
            self.wfile.write(sent)


class Hub:
    """The server; ``asked`` lists the requests."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._server.block_on_close = False  # clients keep their connections open
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Be out of reach from now on."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
