"""Check names and URIs against MLflow's rules before a job begins."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

from ca2cl.common.redact import redact
from ca2cl.errors import InputError, nearest

_SCHEME = re.compile(r"([A-Za-z][\w+.-]*):")
_BARE_ADDRESS = re.compile(r"[\w.-]+:\d+(?:/.*)?")
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_SCHEMES = ("http", "https", "file", "databricks", "databricks-uc", "uc", *_DATABASES)
# lengths that MLflow's tables and its client take
_LONGEST_MODEL, LONGEST_RUN_NAME, _LONGEST_EXPERIMENT = 256, 250, 500
_NOT_IN_MODELS = "/:@'\"`"


def check_model_name(setting: str, name: str) -> None:
    """Refuse a name that no registered model can have, or that ``models:/NAME@ALIAS`` could not name.

    Raises:
        InputError: as said.
    """
    _check_text(setting, name, _LONGEST_MODEL)
    if name in (".", "..") or any(character in _NOT_IN_MODELS for character in name):
        raise InputError(
            f"{setting} is {name!r}: a registered model's name has none of {' '.join(_NOT_IN_MODELS)}; "
            "use letters, digits, . - and _"
        )


def check_experiment(setting: str, name: str) -> None:
    """Refuse a name that no experiment can have.

    Raises:
        InputError: as said.
    """
    _check_text(setting, name, _LONGEST_EXPERIMENT)


def check_run_name(setting: str, name: str) -> None:
    """Refuse a name that no run can have; an empty one asks for the default.

    Raises:
        InputError: as said.
    """
    if name:
        _check_text(setting, name, LONGEST_RUN_NAME)


def _check_text(setting: str, text: str, longest: int) -> None:
    if not text.strip() or text != text.strip():
        raise InputError(f"{setting} is {text!r}: give a name without spaces around it")
    if not text.isprintable():
        raise InputError(f"{setting} is {text!r}: give a name of printable characters")
    if len(text) > longest:
        raise InputError(f"{setting} is {text[:40]!r}...: MLflow takes {longest} characters, this has {len(text)}")


def check_tracking_uri(setting: str, uri: str) -> None:
    """Refuse a tracking URI that can never answer, whatever is started or repaired.

    Raises:
        InputError: its scheme is not one of MLflow's, or it names no host, port or file.
    """
    fault = _fault(uri)
    if fault:
        raise InputError(f"{setting} is {redact(uri)!r}: {fault}")


def _fault(uri: str) -> str:
    if _BARE_ADDRESS.fullmatch(uri):
        return f"give the protocol too, http://{redact(uri)}"
    match = _SCHEME.match(uri)
    if match is None:  # a folder, or the word databricks
        return ""
    scheme = match[1].lower().partition("+")[0]
    rest = uri[match.end() :]
    if scheme in ("http", "https"):
        return _http_fault(uri)
    if scheme == "file":
        alone = rest.startswith("/") and (not rest.startswith("//") or rest[2:3] == "/")
        return "" if alone and rest.strip("/") else "names no folder; give file:///FOLDER with its whole path"
    if scheme == "sqlite":
        whole = rest.startswith("///") and rest[3:].partition("?")[0] not in ("", ":memory:")
        return "" if whole else "names no file to keep anything in; give sqlite:////FOLDER/mlflow.db"
    if scheme in _SCHEMES or any(plugin.name == scheme for plugin in entry_points(group="mlflow.tracking_store")):
        return ""
    return f"MLflow has no protocol {scheme!r}: {nearest(scheme, _SCHEMES)}; correct --tracking.uri"


def _http_fault(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return f"{error}; give http://HOST:PORT"
    if not host:
        return "names no host (an empty variable?); give http://HOST:PORT"
    return "has spaces in it; give http://HOST:PORT" if re.search(r"\s", uri) else ""
