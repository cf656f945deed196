"""Find and fetch artifacts of runs and model versions.

The embedded store's database holds whole paths. Where its folder was moved or copied, or is mounted elsewhere, they are
taken to be beside the database, where they were made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from urllib.parse import quote, urlsplit
from urllib.request import url2pathname

from ca2cl.common.redact import redact
from ca2cl.common.scratch import is_full
from ca2cl.errors import InputError
from ca2cl.store.names import RUN_ID
from ca2cl.store.open import ARTIFACTS, Store, reason, store_errors

_SERVED = ("http", "https", "mlflow-artifacts")  # through the tracking server
_REMEDIES = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, and MLFLOW_S3_ENDPOINT_URL where it is not "
    "Amazon's",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS",
    "wasbs": "set AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCESS_KEY",
    "abfss": "log in with Azure's command line, or set AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_CLIENT_SECRET",
    "hdfs": "set MLFLOW_KERBEROS_TICKET_CACHE and MLFLOW_KERBEROS_USER",
    "sftp": "give the host's key and yours in ~/.ssh",
}
_PACKAGES = {
    "boto3": "boto3",
    "botocore": "boto3",
    "google": "google-cloud-storage",
    "azure": "azure-storage-blob azure-identity",
    "paramiko": "pysftp",
    "pyarrow": "pyarrow",
}


def run_place(store: Store, run_id: str, inside: str = "") -> str:
    """URI of a run's artifacts, or of the folder ``inside`` of them.

    Raises:
        InputError: the store cannot be reached.
    """
    with store_errors(store.uri):
        place = str(store.client.get_run(run_id).info.artifact_uri).rstrip("/")
    return _now(store, f"{place}/{inside}" if inside else place)


def version_place(store: Store, name: str, version: str) -> str:
    """URI of the files of a registered model's version.

    Raises:
        InputError: the store cannot be reached.
    """
    with store_errors(store.uri):
        return _now(store, str(store.client.get_model_version_download_uri(name, version)).rstrip("/"))


def inside(place: str, name: str) -> str:
    """URI of what is called ``name`` in a place; file URIs alone are quoted."""
    return f"{place}/{quote(name) if urlsplit(place).scheme == 'file' else name}"


def names_in(store: Store, place: str) -> list[str]:
    """Names of the files and folders that lie in a place; none where it is not there.

    Raises:
        InputError: the artifact store cannot be read.
    """
    import mlflow

    with _readable(store, place):
        found = mlflow.artifacts.list_artifacts(artifact_uri=place, tracking_uri=store.uri)
        return [PurePosixPath(file.path).name for file in found]


def fetch(store: Store, place: str, folder: Path) -> Path:
    """Copy a place's file or folder into a local folder; returns the copy.

    Raises:
        InputError: it is not there, or the artifact store cannot be read.
    """
    import mlflow

    with _readable(store, place, folder):
        return Path(mlflow.artifacts.download_artifacts(place, dst_path=str(folder), tracking_uri=store.uri))


def moved_place(store: Store, run_id: str) -> Path | None:
    """The folder of a run's artifacts, if the embedded store's database names another one; None where it is right.

    Raises:
        Exception: whatever MLflow raises when it is away.
    """
    return _beside(store, str(store.client.get_run(run_id).info.artifact_uri)) if store.root is not None else None


def local_path(uri: str) -> Path | None:
    """The local path that an artifact URI names; None where it names something else."""
    parts = urlsplit(uri)
    if parts.scheme == "":
        return Path(uri)
    return Path(url2pathname(parts.path)) if parts.scheme == "file" else None


def _beside(store: Store, uri: str) -> Path | None:
    """The path of an artifact below the embedded store, if its URI lies elsewhere: OLD/artifacts/RUN_ID/..."""
    path = local_path(uri)
    if store.root is None or path is None or path.is_relative_to(store.root / ARTIFACTS):
        return None
    for place in range(1, len(path.parts)):
        if path.parts[place - 1] == ARTIFACTS and RUN_ID.fullmatch(path.parts[place]):
            return (store.root / ARTIFACTS).joinpath(*path.parts[place:])
    return None


def _now(store: Store, uri: str) -> str:
    moved, recorded = _beside(store, uri), local_path(uri)
    if moved is None or recorded is None or (recorded.exists() and not moved.exists()):
        return uri
    return moved.as_uri()


@contextmanager
def _readable(store: Store, place: str, folder: Path | None = None) -> Iterator[None]:
    """One line for whatever the client of an artifact store raises: each has errors of its own, or is not installed."""
    scheme = urlsplit(place).scheme
    try:
        with store_errors(store.uri) if scheme in _SERVED else nullcontext():
            yield
    except Exception as error:
        if isinstance(error, InputError) or (folder is not None and is_full(error, folder)):
            raise
        why, remedy = _why(error), _REMEDIES.get(scheme, "give back its files, or another run")
        if isinstance(error, ImportError):
            package = (error.name or "").partition(".")[0]
            why, remedy = f"{package} is not installed", f"pip install {_PACKAGES.get(package, package)}"
        raise InputError(f"artifact store {redact(place)} cannot be read: {why}; {remedy}") from None


def _why(error: Exception) -> str:
    # below a heading of its own, MLflow quotes the error of the first file
    match = re.search(r"##### File .*? #####\s*(.+)", str(error))
    return redact(match[1])[:200] if match else reason(error)
