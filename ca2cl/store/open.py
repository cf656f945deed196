"""Choose and open the MLflow store of a job.

An explicit URI wins over ``MLFLOW_TRACKING_URI``, and that over the embedded store: a SQLite file and an artifact
folder side by side under one root, both written down as absolute paths so that any working directory finds them again.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ca2cl.common.locks import exclusive_lock
from ca2cl.common.mlflow_names import check_tracking_uri
from ca2cl.common.redact import redact
from ca2cl.errors import InputError
from ca2cl.store.databases import database_of, sqlite_uri
from ca2cl.store.quiet import quiet_mlflow
from ca2cl.store.template import lacks_nothing, start_database

if TYPE_CHECKING:
    from mlflow import MlflowClient

_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's pages then begin with runs and metrics, and not with traces of language models."""
DEFAULT_ROOT = "ca2cl-runs"
DATABASE = "mlflow.db"
ARTIFACTS = "artifacts"
_UNAUTHORIZED = frozenset({"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED"})
# answers that waiting does not change; every other failure of a server is an outage
_FINAL = _UNAUTHORIZED | {
    "BAD_REQUEST", "ENDPOINT_NOT_FOUND", "INVALID_PARAMETER_VALUE", "NOT_FOUND", "RESOURCE_DOES_NOT_EXIST",
}  # fmt: skip
_FINAL_TEXTS = (
    "CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER", "BadStatusLine", "not in a valid JSON format", "Invalid url",
)  # fmt: skip
# SQLite's words, which come with a page of SQL
_OF_FILES = {
    "disk is full": "its disk is full",
    "readonly database": "its file cannot be written",
    "unable to open database file": "its file cannot be opened",
    "disk I/O error": "its disk fails",
}
_DRIVERS = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


class StoreAway(InputError):
    """A tracking store that cannot be reached or fails by itself: later it may work.

    Attributes:
        why: in a few words.
    """

    def __init__(self, message: str, why: str) -> None:
        super().__init__(message)
        self.why = why


@dataclass(frozen=True)
class Store:
    """An open tracking store and registry."""

    uri: str
    """Secrets and all: it is never written down."""
    root: Path | None
    """Folder of the embedded store; None for any other."""

    @cached_property
    def client(self) -> MlflowClient:
        """MLflow's client for it. The first one imports MLflow, which takes seconds.

        Raises:
            InputError: MLflow cannot use such a store.
        """
        quiet_mlflow()
        from mlflow import MlflowClient

        with store_errors(self.uri):
            return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    @property
    def public_uri(self) -> str:
        """The URI without user names, passwords and tokens."""
        return redact(self.uri)

    @property
    def place(self) -> str:
        """The store as ``--tracking.root`` or ``--tracking.uri`` takes it, without secrets."""
        return str(self.root) if self.root is not None else self.public_uri

    def experiment_id(self, name: str) -> str:
        """Id of the experiment ``name``, made if there is none; processes that make it at once get the same one.

        Raises:
            InputError: it was deleted, or the store cannot be reached.
        """
        from mlflow.exceptions import MlflowException

        location = f"{(self.root / ARTIFACTS).as_uri()}" if self.root else None
        with _locked(self.root), store_errors(self.uri):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(self.client.create_experiment(name, artifact_location=location, tags=_EXPERIMENT_TAGS))
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = self.client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise InputError(
                f"tracking.experiment is {name!r}: it was deleted in {self.public_uri}; restore it or give another name"
            )
        return str(found.experiment_id)

    def surely_takes(self, experiment: str) -> bool:
        """True if a look at the embedded store's file shows that MLflow will take a run of ``experiment``.

        MLflow refuses a database of another version, one that it cannot write, and a deleted experiment.
        """
        return self.root is not None and lacks_nothing(self.root / DATABASE, experiment)


def resolve_uri(uri: str | None, root: str | Path = DEFAULT_ROOT) -> tuple[str, Path | None]:
    """The tracking URI to use, and the root folder when it is an embedded store's.

    Raises:
        InputError: it can never answer.
    """
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not chosen:
        folder = Path(root).expanduser().resolve()
        return sqlite_uri(folder / DATABASE), folder
    check_tracking_uri("tracking.uri" if uri else "MLFLOW_TRACKING_URI", chosen)
    database = database_of(chosen)
    if database is not None and not database.parent.is_dir():  # MLflow would make it, for a slip of the pen too
        where = f"tracking store {redact(chosen)}: no folder {database.parent}"
        raise InputError(f"{where}; make it, or give another --tracking.uri")
    embedded = database is not None and database.name == DATABASE and (database.parent / ARTIFACTS).is_dir()
    return chosen, database.parent.resolve() if database is not None and embedded else None


def store_place(uri: str | None, root: str | Path = DEFAULT_ROOT) -> str:
    """``Store.place`` of the store that ``open_store`` opens; it is not looked at."""
    return Store(*resolve_uri(uri, root)).place


def open_store(uri: str | None = None, root: str | Path = DEFAULT_ROOT, *, check: bool = True) -> Store:
    """Open the store, make the embedded one if it is not there yet, and check that it answers.

    Args:
        uri: tracking URI; None takes MLFLOW_TRACKING_URI, or the embedded store.
        root: folder of the embedded store.
        check: False leaves the check out, and with it MLflow's import.

    Raises:
        InputError: unknown scheme, unreachable server, unwritable folder.
    """
    chosen, folder = resolve_uri(uri, root)
    store = Store(chosen, folder)
    if folder is not None:
        try:
            (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"tracking.root is {str(root)!r}: {error.strerror}; use a folder you can write") from None
    with _locked(folder), store_errors(chosen):
        if folder is not None:
            start_database(folder / DATABASE)
        if check:
            store.client.search_experiments(max_results=1)
    return store


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn a store's failure into one line that names the store, the reason and the remedy.

    Raises:
        StoreAway: the store cannot be reached, or fails by itself.
        InputError: any other failure.
    """
    try:
        yield
    except InputError:
        raise
    except ModuleNotFoundError as error:
        name = str(error.name)
        message = f"tracking store {redact(uri)} cannot be used: {name} is not installed"
        raise InputError(f"{message}; pip install {_DRIVERS.get(name, name)}") from None
    except away_errors() as error:
        why, remedy = reason(error), "start the server, or give another --tracking.uri"
        if getattr(error, "error_code", None) in _UNAUTHORIZED:
            remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        elif uri.startswith("databricks"):
            remedy = "set DATABRICKS_HOST and DATABRICKS_TOKEN"
        elif why in _OF_FILES.values():
            remedy = "free space or mend its permissions, or give another --tracking.root"
        elif not _is_outage(error):
            remedy = "give another --tracking.uri"
        message = f"tracking store {redact(uri)} cannot be used: {why}; {remedy}"
        raise (StoreAway(message, why) if _is_outage(error) else InputError(message)) from None


def _is_outage(error: Exception) -> bool:
    final = getattr(error, "error_code", None) in _FINAL or any(text in str(error) for text in _FINAL_TEXTS)
    return not final


def is_server(uri: str) -> bool:
    """True if a tracking URI names a server, which may be away for a while."""
    return uri.startswith(("http://", "https://"))


def check_host(uri: str) -> None:
    """Refuse a server whose host name does not resolve, for a first start: later that is an outage of the name server.

    Raises:
        InputError: there is no such host.
    """
    host = urlsplit(uri).hostname
    if {"http", "https", "all"} & set(getproxies()):  # then it is looked up there
        return
    try:
        socket.getaddrinfo(host, None)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, UnicodeError) or error.errno == socket.EAI_NONAME:
            raise InputError(f"tracking store {redact(uri)}: no host is called {host!r}; correct it") from None


def away_errors() -> tuple[type[Exception], ...]:
    """Exceptions of MLflow's clients when a store is away, full or refuses."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    return (MlflowException, RequestException, SQLAlchemyError, OSError)


def reason(error: BaseException) -> str:
    """One short line on what went wrong, without secrets or object addresses."""
    if isinstance(error, StoreAway):
        return error.why
    code = getattr(error, "error_code", None)
    if code in _UNAUTHORIZED:  # the server's own words may repeat what it was sent
        return "not permitted (403)" if code == "PERMISSION_DENIED" else "wrong or missing credentials (401)"
    text = redact(" ".join(str(error).split())) or type(error).__name__
    if known := next((words for part, words in _OF_FILES.items() if part in text), ""):
        return known
    if "WRONG_VERSION_NUMBER" in text:
        return "it does not speak https, perhaps http"
    if "BadStatusLine" in text:
        return "it does not speak http, perhaps https"
    if "Connection refused" in text:
        return "connection refused"
    if "Name or service not known" in text or "name resolution" in text or "getaddrinfo" in text:
        return "unknown host"
    if "timed out" in text or "Read timed out" in text:
        return "timed out"
    if failing := re.search(r"too many (\d+) error responses", text):
        return f"it answers with HTTP status {failing[1]}"
    if "Connection aborted" in text or "Connection reset" in text:
        return "it breaks connections off"
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", text)
    return text if len(text) <= 200 else text[:197] + "..."


def find_run(store: Store, run_id: str) -> Any | None:
    """The MLflow run ``run_id``, or None where the store does not have it.

    Raises:
        InputError: the store cannot be reached.
    """
    from mlflow.exceptions import MlflowException

    with store_errors(store.uri):
        try:
            return store.client.get_run(run_id) if run_id else None
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise


def fetch_run(store: Store, run_id: str) -> Any:
    """The MLflow run ``run_id``.

    Raises:
        InputError: there is none, or the store cannot be reached.
    """
    run = find_run(store, run_id)
    if run is None:
        raise InputError(f"run {run_id!r}: not in {store.public_uri}; check the id, --tracking.uri or --tracking.root")
    return run


def all_pages(search: Callable[..., Any], *wanted: Any, page: int = 1000) -> Iterator[Any]:
    """Yield all that one of the client's searches finds: a single call answers with the first page alone."""
    token = None
    while True:
        found = search(*wanted, max_results=page, page_token=token)
        yield from found
        token = found.token
        if not token:
            return


@contextmanager
def _locked(folder: Path | None) -> Iterator[None]:
    """One process at a time in the embedded store's set-up: SQLite migrations of two at once collide."""
    with ExitStack() as held:
        try:
            if folder is not None:
                held.enter_context(exclusive_lock(folder / ".store.lock", per_process=False))
        except OSError as error:
            raise InputError(
                f"tracking.root is {str(folder)!r}: {error.strerror}; use a folder you can write"
            ) from None
        yield
