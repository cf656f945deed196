"""User names, passwords and tokens of URIs are used and never shown: not written, not sent, not printed."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import pytest

from ca2cl.cli import entry as cli
from ca2cl.cli import main
from ca2cl.common.redact import RedactingFormatter, redact, redact_all
from ca2cl.config import DataConfig, RunConfig, TrackingConfig, flatten
from ca2cl.data.remote.reader import FetchPolicy, ShardReader, open_index
from ca2cl.data.transfer.download import join
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import name_sets
from ca2cl.evaluation.report import write_json
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.tracking.run import open_run
from tests.support.jobs import ROOT, make_shards
from tests.support.servers import Server
from tests.support.shards import encode, random_tiles, write_shards

QUICK = FetchPolicy(attempts=2, timeout=30, pause=0.01)
SECRET = "hunter2"
LOGIN = f"me-too:{SECRET}"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        (f"https://{LOGIN}@host:5000/a", "https://host:5000/a"),
        (f"https://me-too:p@{SECRET}@host/a", "https://host/a"),
        (f"https://{SECRET}@host/a?x=1", "https://host/a?x=1"),
        (f"s3://me-too:abc/{SECRET}+x@bucket/a", "s3://bucket/a"),
        (f"postgresql+psycopg2://me-too:a/b?c#{SECRET}@host/db", "postgresql+psycopg2://host/db"),
        (f"mysql://me-too:1234/{SECRET}@host/db", "mysql://host/db"),
        (f"simplecache::https://{LOGIN}@host/a", "simplecache::https://host/a"),
        (f"https://host/a?token={SECRET}&x=1", "https://host/a?token=***&x=1"),
        (f"https://host/a?x=1&X-Amz-Signature={SECRET}", "https://host/a?x=1&X-Amz-Signature=***"),
        (f"https://host/a?sv=1&sig={SECRET}", "https://host/a?sv=1&sig=***"),
        (f"https://host/a?password={SECRET};pwd={SECRET}", "https://host/a?password=***;pwd=***"),
        (f"https://host/a#access_token={SECRET}", "https://host/a#access_token=***"),
        (f"s3://bucket/a?aws_secret_access_key={SECRET}", "s3://bucket/a?aws_secret_access_key=***"),
        (f"https://host/a?Authorization={SECRET}", "https://host/a?Authorization=***"),
        (f"https:/{LOGIN}@host/a", "https:/host/a"),
        (f"two: http://{LOGIN}@a/b and http://{LOGIN}@c", "two: http://a/b and http://c"),
    ],
)
def test_what_is_secret_of_a_uri_is_taken_out(uri: str, shown: str) -> None:
    assert redact(uri) == shown and redact(shown) == shown


@pytest.mark.parametrize(
    "uri",
    ["sqlite:////data/runs/mlflow.db", "models:/ca2cl-encoder@champion", "http://host:5000/model@v1", "a@b", "a: b@c",
     "https://host/a?x=1&tile=2", "s3://bucket/a@b/c", "/data/a@b", "hf:user/set", "torchvision:IMAGENET1K_V1"],
)  # fmt: skip
def test_what_is_not_secret_stays(uri: str) -> None:
    assert redact(uri) == uri


def test_nested_settings_are_redacted_in_values_and_names() -> None:
    uri = f"http://{LOGIN}@h/x"
    assert redact_all({uri: [uri, (uri, 1)], "n": None}) == {"http://h/x": ["http://h/x", ["http://h/x", 1]], "n": None}


class _Guarded(SimpleHTTPRequestHandler):
    """Files behind a password, or behind a token in the query."""

    def do_GET(self) -> None:
        login = f"Basic {base64.b64encode(LOGIN.encode()).decode()}"
        token = f"token={SECRET}" in urlsplit(self.path).query
        if self.headers.get("Authorization") != login and not token:
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def guarded(folder: Path) -> Iterator[str]:
    """Host and port of a server of ``folder``."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Guarded, directory=str(folder)))
    thread = Thread(target=partial(server.serve_forever, poll_interval=0.02), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def hidden(text: str) -> bool:
    """Whether neither the password nor the user's name is in it, nor both as a header has them."""
    encoded = base64.b64encode(LOGIN.encode()).decode().rstrip("=")
    return not any(word in text for word in (SECRET, "me-too", encoded))


@pytest.mark.parametrize(
    "form", [f"http://{LOGIN}@HOST/s", f"http://HOST/s?token={SECRET}", f"http://HOST/s/?token={SECRET}&a=1"]
)
def test_a_url_with_a_secret_works_and_the_secret_stays_in_it(form: str, tmp_path: Path, caplog: Any) -> None:
    write_shards(tmp_path / "served" / "s", [encode(tile) for tile in random_tiles(3)])
    with guarded(tmp_path / "served") as host:
        url = form.replace("HOST", host)
        index = open_index(url, tmp_path / "cache", QUICK)
        reader = ShardReader(url, index=index, policy=QUICK)
        samples = index.samples(0)
        assert reader.read("shard-000000.tar", int(samples.offset[0]), int(samples.size[0])) == encode(
            random_tiles(3)[0]
        )
        again = form.replace("HOST", host).replace(SECRET, "changed").replace(LOGIN, f"you:{SECRET}")
        messages = []
        for bad in (again, url.replace("/s", "/none", 1)):
            with pytest.raises(InputError) as caught:
                open_index(bad, tmp_path / "cache", QUICK)
            messages.append(str(caught.value))
        with pytest.raises(InputError) as caught:
            open_index(url, None)
        messages.append(str(caught.value))
    assert hidden(" ".join(messages)) and "changed" not in " ".join(messages) and hidden(caplog.text)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # one name, whatever the secret
    assert hidden(" ".join(map(str, (tmp_path / "cache").rglob("*"))))


def test_a_query_stays_behind_the_path() -> None:
    assert join("https://h/a?t=1", "x.tar") == "https://h/a/x.tar?t=1"
    assert join("https://h/a/", "x.tar") == "https://h/a/x.tar"
    assert join("s3://b/a?c", "x.tar") == "s3://b/a?c/x.tar"  # a question mark may be in a key


def secret_config(root: Path) -> PretrainConfig:
    shards = f"https://{LOGIN}@host/x?token={SECRET}"
    return PretrainConfig(
        data=DataConfig(lanes=8, shards=shards, cache_dir=f"/a?key={SECRET}"),
        run=RunConfig(batch_size=16, steps=1),
        tracking=TrackingConfig(root=str(root)),
    )


def test_settings_are_written_down_without_secrets(tmp_path: Path) -> None:
    config = replace(
        secret_config(tmp_path), tracking=TrackingConfig(uri=f"http://{LOGIN}@127.0.0.1:9/?token={SECRET}")
    )
    flat = flatten(config)
    assert hidden(json.dumps(flat)) and flat["data.shards"] == "https://host/x?token=***"
    write_json(
        tmp_path / "x.json", {"config": flat, "shards": config.data.shards, config.data.shards: [config.data.shards]}
    )
    assert hidden((tmp_path / "x.json").read_text())
    assert name_sets([config.data.shards, f"s3://{LOGIN}@b/y"]) == ["x", "y"]


def test_a_run_keeps_no_secret_and_goes_on_without_its_store(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = secret_config(tmp_path_factory.getbasetemp() / "tracking-tests")  # shared: making one takes seconds
    open_run(tmp_path / "run", config).finish("FINISHED")
    away = replace(config, tracking=replace(config.tracking, uri=f"http://{LOGIN}@127.0.0.1:9/?token={SECRET}"))
    open_run(tmp_path / "run", away, resume=True).finish("FAILED", timeout=1)
    open_run(tmp_path / "other", away).finish("FAILED", timeout=1)
    assert hidden(caplog.text) and "MLflow at http://127.0.0.1:9" in caplog.text
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"journal.jsonl", "run.json", "config.yaml"} <= {path.name for path in found}
    assert all(hidden(path.read_bytes().decode("latin-1")) for path in found)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", f"--data.shards=http://{LOGIN}@h/x", "--run.output_dir=o", "--run.steps=1"],
        ["embed", "--encoder=random", f"--source=http://{LOGIN}@h/x?token={SECRET}", "--out=o.parquet"],
        ["embed", f"--encoder=http://{LOGIN}@h/x", "--source=.", "--out=o.parquet"],
        ["shard", f"--source=https://{LOGIN}@h/x", "--out=o"],
        ["encoders", "list", f"--tracking.uri=sqlite:////proc/none/x.db?password={SECRET}"],
        ["pretrain", f"--data.shard=https://{LOGIN}@h/x"],
        ["pretrain", f"--data.workers=https://{LOGIN}@h/x?token={SECRET}"],
        ["sync", f"--run_dir=https://{LOGIN}@h/x"],
    ],
)
def test_an_error_shows_no_secret(arguments: list[str], capfd: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capfd.readouterr()
    assert hidden(said.out + said.err), said
    assert "ca2cl: error" in said.err


def test_a_fault_of_ours_shows_its_traceback_and_no_secret(capfd: Any, monkeypatch: Any) -> None:
    def broken(arguments: list[str]) -> int:
        raise RuntimeError(f"GET {arguments[0]} failed")

    monkeypatch.setattr(cli, "_dispatch", broken)
    assert main([f"http://{LOGIN}@h/x?token={SECRET}"]) == 1
    said = capfd.readouterr().err
    assert "RuntimeError: GET http://h/x?token=*** failed" in said and "in broken" in said and hidden(said)


def test_a_line_of_the_log_shows_no_secret() -> None:
    record = logging.LogRecord("x", logging.INFO, "x", 1, "GET %s", (f"http://{LOGIN}@h",), None)
    assert RedactingFormatter("%(message)s").format(record) == "GET http://h"


@pytest.mark.slow
def test_a_whole_run_on_guarded_servers_leaves_no_secret_anywhere(tmp_path: Path) -> None:
    """Shards behind a token, and an MLflow server behind a password in MLFLOW_TRACKING_URI; then a probe of it."""
    make_shards(tmp_path / "served", 4)
    server = Server(_made(tmp_path / "mlflow"))
    server.start(patience=240)
    uri = server.uri.replace("://", f"://{LOGIN}@")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"MLFLOW_TRACKING_URI": uri, "AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET}
    try:
        with guarded(tmp_path / "served") as host:
            url = f"http://{LOGIN}@{host}/shards-0?token={SECRET}"
            run = ["pretrain", "--recipe", "smoke", f"--data.shards={url}", "--data.cache_dir=cache", "--run.steps=2"]
            run += ["--run.output_dir=out/run", "--data.workers=0", "--data.lanes=4", "--run.batch_size=16"]
            other = url.replace("token", "x=1&token")
            probe = [
                "probe",
                "--encoder=out/run",
                "--train",
                url,
                "--test",
                other,
                "--cache_dir=cache",
                "--imagenet=false",
            ]
            probe += ["--labels", "1.0", "--seeds=1", "--output=out/probe.json", "--workers=0", "--classifiers", "knn"]
            said = "".join(_told(arguments, tmp_path, env) for arguments in (run, probe))
    finally:
        server.stop()
    assert hidden(said), said
    for folder in ("out", "cache", "mlflow"):
        for path in (tmp_path / folder).rglob("*"):
            assert hidden(str(path)), path
            assert not path.is_file() or hidden(path.read_bytes().decode("latin-1")), path


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _told(arguments: list[str], folder: Path, env: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ca2cl", *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
