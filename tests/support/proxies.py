"""A real HTTP proxy in front of a tracking server that misbehaves on command."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "hunter2"
Behaviour = Callable[[str, str, int], str]


class Proxy:
    """Passes requests on to ``port``, unless it is told to do something else with them.

    Attributes:
        behave: called with the method, the path and the number of the request (from 0); says what is done with it:
            ``pass``, a status as text (``500``, ``401``), ``html`` (200, but no MLflow), ``hang`` (never an answer) or
            ``deaf`` (passed on, but the answer is lost).
        delay: seconds before every answer.
        seen: how many requests there were.
    """

    def __init__(self, port: int) -> None:
        self.port, self.delay, self.seen = port, 0.0, 0
        self.behave: Behaviour = _passing
        self._let_go, self._lock = threading.Event(), threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.uri = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def always(self, what: str) -> None:
        """Do the same with every request."""
        self.behave = lambda *_: what

    def stop(self) -> None:
        """End it, and every request that hangs."""
        self._let_go.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self._lock:
            number, self.seen = self.seen, self.seen + 1
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        what = self.behave(request.command, request.path, number)
        if what == "hang":
            self._let_go.wait()
            return
        time.sleep(self.delay)
        if what in ("pass", "deaf"):
            status, kind, content = self._passed_on(request, body)
        else:
            status, kind = (200, "text/html") if what == "html" else (int(what), "text/plain")
            content = f"<p>not MLflow: {request.headers.get('Authorization')} {SECRET}</p>".encode()
        if what != "deaf":
            request.send_response(status)
            request.send_header("Content-Type", kind)
            request.send_header("Retry-After", "600")
            request.send_header("Content-Length", str(len(content)))
            request.end_headers()
            request.wfile.write(content)

    def _passed_on(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, str, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kept = {name: value for name, value in request.headers.items() if name.lower() not in ("host", "connection")}
        try:
            connection.request(request.command, request.path, body, kept)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type") or "", answer.read()
        except OSError:
            return 502, "text/plain", b"bad gateway"
        finally:
            connection.close()


def _passing(_method: str, _path: str, _number: int) -> str:
    return "pass"


def _handler(proxy: Proxy) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            with suppress(ConnectionError):  # the client has given up
                proxy.answer(self)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

        def log_message(self, *_: object) -> None:
            """Nothing: pytest's output is not a server's log."""

    return Handler
