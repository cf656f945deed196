"""Small files among a run's artifacts: read as text, and added to."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ca2cl.tracking.store import Store, store_errors
from ca2cl.tracking.upload import upload
from ca2cl.untrusted import parse_json

_log = logging.getLogger(__name__)


def artifact_texts(store: Store, run_id: str, names: Sequence[str]) -> dict[str, str]:
    """Text of those of a run's artifacts that there are.

    Raises:
        InputError: the store cannot be reached.
    """
    with store_errors(store.uri), tempfile.TemporaryDirectory() as scratch:
        there = {file.path for file in store.client.list_artifacts(run_id)}
        paths = {name: store.client.download_artifacts(run_id, name, scratch) for name in names if name in there}
        return {name: Path(path).read_text(encoding="utf-8", errors="replace") for name, path in paths.items()}


def json_artifacts(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The JSON objects among a run's own artifacts; damaged ones are left out with a warning.

    Raises:
        InputError: the store cannot be reached.
    """
    with store_errors(store.uri):
        names = sorted(file.path for file in store.client.list_artifacts(run_id) if file.path.endswith(".json"))
    found = []
    for name, text in artifact_texts(store, run_id, names).items():
        try:
            content = parse_json(text)
        except ValueError:
            _log.warning("run %s: %s is not JSON and is left out", run_id, name)
            continue
        if isinstance(content, dict):
            found.append(content)
    return found


def add_artifact(store: Store, run_id: str, path: Path, to: str) -> None:
    """Copy a file to a run's artifacts, under the folder ``to``.

    Raises:
        InputError: the store cannot be reached or written.
    """
    with store_errors(store.uri):
        upload(store.client, run_id, path, to)
