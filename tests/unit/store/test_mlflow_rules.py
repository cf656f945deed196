"""Names and addresses that MLflow refuses, or that can never answer, are refused before the job."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from pathlib import Path

import pytest

from ca2cl.cli.parser import parse
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.store.open import StoreAway, check_host, open_store, resolve_uri


@pytest.mark.parametrize(
    "name", ["a/b", "a:b", "", " ", "a ", "\ta", "a\nb", "a@b", "a'b", 'a"b', "a`b", "..", "x" * 257, "a\x00"]
)
def test_a_models_name(name: str) -> None:
    with pytest.raises(InputError, match=r"tracking\.register_as is"):
        TrackingConfig(register_as=name)


def test_names_that_mlflow_takes() -> None:
    for name in ("ca2cl-encoder", "my encoder", "main.default.enc_1", "组织", "x" * 256):
        assert TrackingConfig(register_as=name, experiment=f"/Users/{name}", run_name=name[:250])
    for name in ("", "  ", "x" * 501, "a\tb"):
        with pytest.raises(InputError, match=r"tracking\.experiment is"):
            TrackingConfig(experiment=name)
    with pytest.raises(InputError, match=r"tracking\.run_name is"):
        TrackingConfig(run_name="x" * 251)


@pytest.mark.parametrize(
    ("uri", "remedy"),
    [
        ("http://", "names no host"),
        ("https:///x", "names no host"),
        ("http://:5000", "names no host"),
        ("http:/127.0.0.1:9", "names no host"),
        ("http://h:99999", "give http://HOST:PORT"),
        ("http://h:abc", "give http://HOST:PORT"),
        ("http://[::1", "give http://HOST:PORT"),
        ("http://a b/", "spaces"),
        ("127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("localhost:5000", "http://localhost:5000"),
        ("htp://h", "did you mean http?"),
        ("htts://h", "did you mean http"),
        ("s3://b/x", "no protocol 's3'"),
        ("models:/x", "no protocol 'models'"),
        ("file://", "names no folder"),
        ("file:", "names no folder"),
        ("file://x/y", "names no folder"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:/x.db", "names no file"),
    ],
)
def test_an_address_that_can_never_answer(uri: str, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError) as caught:
        parse("probe", ["--encoder", "random", "--train", "a", "--test", "b", "--tracking.uri", uri])
    assert str(caught.value).startswith("tracking.uri is ") and remedy in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(InputError, match="^MLFLOW_TRACKING_URI is "):
        resolve_uri(None)


@pytest.mark.parametrize(
    "uri",
    ["http://h", "https://u:p@h:8443/x?a=b", "http://[::1]:5000", "file:///a", "file:/a", "sqlite:///a.db",
     "mlruns", "sqlite:////a/b.db", "databricks", "databricks://profile", "databricks-uc", "./x",
     "postgresql+psycopg2://u:p@h/d"],
)  # fmt: skip
def test_an_address_that_may(uri: str) -> None:
    assert TrackingConfig(uri=uri).uri == uri


def test_a_database_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder"):
        open_store(f"sqlite:///{tmp_path}/typo/m.db")
    assert not (tmp_path / "typo").exists()


def test_a_driver_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyodbc", None)
    with pytest.raises(InputError, match="pyodbc is not installed; pip install pyodbc"):
        open_store("mssql+pyodbc://u:p@127.0.0.1:1/d")


class Plain(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_another_protocol_than_the_servers_is_final_and_an_outage_is_not() -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(InputError, match="does not speak https, perhaps http") as caught:
        open_store(f"https://127.0.0.1:{server.server_port}")
    assert not isinstance(caught.value, StoreAway)
    server.shutdown()
    server.server_close()
    with pytest.raises(StoreAway, match="connection refused; start the server"):
        open_store(f"http://127.0.0.1:{server.server_port}")


def test_a_server_that_speaks_no_http_is_final() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            while True:
                try:
                    with listening.accept()[0] as met:
                        met.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
                except OSError:
                    return

        threading.Thread(target=greet, daemon=True).start()
        with pytest.raises(InputError, match="does not speak http,") as caught:
            open_store(f"http://127.0.0.1:{listening.getsockname()[1]}")
        assert not isinstance(caught.value, StoreAway)
        listening.shutdown(socket.SHUT_RDWR)


def test_a_host_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    check_host("http://localhost:5000")
    with pytest.raises(InputError, match="no host is called"):
        check_host(f"http://{'x' * 70}.example:5000")  # no name of the internet has a part of more than 63 letters
