"""Read and add small text artifacts of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ca2cl.common.records import parse_json
from ca2cl.common.scratch import scratch_folder
from ca2cl.store.artifacts import fetch, inside, names_in, run_place
from ca2cl.store.open import Store, store_errors
from ca2cl.store.upload import upload

_log = logging.getLogger(__name__)


def artifact_texts(store: Store, run_id: str, names: Sequence[str]) -> dict[str, str]:
    """Text of those of a run's artifacts that there are.

    Raises:
        InputError: the store cannot be reached.
    """
    place = run_place(store, run_id)
    there = set(names_in(store, place))
    with scratch_folder() as scratch:
        paths = {name: fetch(store, inside(place, name), scratch) for name in names if name in there}
        return {name: path.read_text(encoding="utf-8", errors="replace") for name, path in paths.items()}


def json_artifacts(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The JSON objects among a run's own artifacts; damaged ones are left out with a warning.

    Raises:
        InputError: the store cannot be reached.
    """
    names = sorted(name for name in names_in(store, run_place(store, run_id)) if name.endswith(".json"))
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

    Args:
        store: an open one.
        run_id: of the run.
        path: the file.
        to: artifact folder.

    Raises:
        InputError: the store cannot be reached or written.
    """
    with store_errors(store.uri):
        upload(store, run_id, path, to)
