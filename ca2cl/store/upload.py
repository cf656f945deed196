"""Upload artifacts to a run in MLflow and verify them.

MLflow's client takes any answer with status 200 for an upload's success, a proxy's page too. So every upload is
checked: a file that counts as sent is never sent again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from ca2cl.errors import InputError
from ca2cl.store.artifacts import local_path, moved_place
from ca2cl.store.open import Store, away_errors, reason


class LostUpload(OSError):
    """A file did not arrive, though MLflow itself answers: as good as away, so it is tried again."""


def upload(store: Store, run_id: str, path: Path, to: str | None = None) -> None:
    """Copy a file, or what is in a folder, into the artifact folder ``to`` of a run (None: its root).

    Args:
        store: an open one.
        run_id: of the run.
        path: file or folder.
        to: artifact folder; None: the run's root.

    Raises:
        LostUpload: the run does not have it afterwards, whole; or the client of its artifact store (S3, Google, Azure;
            each has errors of its own) could not send it, or is not installed.
        Exception: whatever MLflow raises when it is away.
    """
    try:
        moved = moved_place(store, run_id)
        if moved is None:
            _upload(store, run_id, path, to)
        else:
            _copy(path, moved / (to or ""))
    except Exception as error:
        if isinstance(error, (InputError, *away_errors())):
            raise
        raise LostUpload(f"its artifact store: {type(error).__name__}: {reason(error)}") from error


def _copy(path: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    else:
        shutil.copy2(path, target)


def _upload(store: Store, run_id: str, path: Path, to: str | None) -> None:
    client = store.client
    local = local_path(str(client.get_run(run_id).info.artifact_uri))
    (client.log_artifacts if path.is_dir() else client.log_artifact)(run_id, str(path), to)
    if not path.is_dir():
        _check(store, run_id, to, {path.name: path.stat().st_size}, local)
        return
    for folder in (path, *(entry for entry in sorted(path.rglob("*")) if entry.is_dir())):
        files = {entry.name: entry.stat().st_size for entry in folder.iterdir() if entry.is_file()}
        inside = "/".join([*([to] if to else []), *folder.relative_to(path).parts])
        if files:
            _check(store, run_id, inside or None, files, local)


def _check(store: Store, run_id: str, to: str | None, files: dict[str, int], local: Path | None) -> None:
    if local is not None:
        there = (local / (to or "")).iterdir()
        found = {entry.name: entry.stat().st_size for entry in there if entry.is_file()}
    else:
        found = {entry.path.rpartition("/")[2]: entry.file_size for entry in store.client.list_artifacts(run_id, to)}
    for name, size in files.items():
        if name not in found or found[name] not in (size, None):  # not every store lists sizes
            raise LostUpload(f"it took {name} and does not have it")
