"""Ports of loopback for servers that are told of theirs."""

from __future__ import annotations

import socket
from collections import deque

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
