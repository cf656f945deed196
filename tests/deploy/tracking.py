"""The tracking server end to end: `bash tests/deploy/tracking.sh` makes what it needs and runs it.

Prints a line a check and a table, and exits with 0 when all of them held.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import requests

from tests.deploy.stack import DATABASES, DOCKER, Postgres, Service, store, tracking
from tests.support.jobs import ROOT, make_shards, pretrain, start
from tests.support.ports import free_port

NAME = "mlflow.example.org"
STEPS = 3
# There is no Docker here: backup.sh's programs run as they are, on this machine's paths; starting and stopping is ours.
IN_PLACE_OF_DOCKER = """#!/usr/bin/env bash
set -euo pipefail
shift 3  # compose --file FILE
case $1 in
    exec) exec "${@:4}" ;;  # exec -T postgres PROGRAM ...
    run) arguments=("${@:8}"); exec "$6" "${arguments[@]/#\\/data/$DATA}" ;;  # run (4 flags) PROGRAM seaweedfs ...
    stop | up) echo "here, the test does: $*" ;;
esac
"""


def main() -> int:
    held: list[tuple[str, str]] = []
    with tempfile.TemporaryDirectory(prefix="ca2cl-tracking-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # PostgreSQL's user passes through it
        secrets = folder / "secrets"
        subprocess.run([DOCKER / "make_secrets.sh", secrets], check=True, stdout=subprocess.DEVNULL)
        postgres = Postgres(folder, secrets / "postgres_password")
        seaweed, store_uri = store(folder / "seaweedfs", secrets)
        port = free_port()
        uri = f"http://127.0.0.1:{port}"
        server = tracking(folder / "mlflow", secrets, postgres, store_uri, NAME, port)
        with running(postgres), running(seaweed):
            postgres.run("createdb", "mlflow")  # POSTGRES_DB
            postgres.run("psql", "--quiet", "--dbname=mlflow", f"--file={DOCKER / 'mlflow-databases.sql'}")
            with running(server):
                held += doors(uri, named=True)
                anna, ben = (user(person, uri, secrets) for person in ("anna", "ben"))
                held += jobs(folder, uri, anna)
                kept = contents(uri, anna)
                held += [("what is there", str(kept)), rights(uri, ben)]
            backup(folder, postgres, seaweed)
            # as where nobody else is to reach it
            server = tracking(folder / "mlflow", secrets, postgres, store_uri, "", port)
            upgrade = [*server.command, "upgrade"]  # from this version to this version, but by the same programs
            subprocess.run(upgrade, env={**os.environ, **server.changes}, check=True, stderr=subprocess.DEVNULL)
            with running(server):
                assert contents(uri, anna) == kept
                held += [("backup, all removed, restore", "the same contents, for the same user")]
                held += doors(uri, named=False)
    width = max(len(what) for what, _ in held)
    sys.stdout.write("\n" + "".join(f"{what:{width}}  {found}\n" for what, found in held))
    return 0


@contextmanager
def running(service: Service | Postgres) -> Iterator[None]:
    service.start()
    try:
        yield
    finally:
        service.stop()


def doors(uri: str, *, named: bool) -> list[tuple[str, str]]:
    """Whom the server lets in: nobody without a password, and by which names."""

    def status(host: str | None = None, origin: str | None = None) -> int:
        headers = {key: value for key, value in {"Host": host, "Origin": origin}.items() if value}
        query = {"max_results": 1}
        return requests.post(f"{uri}/api/2.0/mlflow/runs/search", json=query, headers=headers, timeout=30).status_code

    inside, outside = 401, 403  # asked for a password; not even that
    found = {
        "no password": (status(), inside),
        f"by the name {NAME}": (status(NAME), inside if named else outside),
        "by another name": (status("evil.example.com"), outside),
        f"from a page of https://{NAME}": (status(origin=f"https://{NAME}"), inside if named else outside),
        "from a page elsewhere": (status(origin="https://evil.example.com"), outside),
    }
    for what, (got, wanted) in found.items():
        assert got == wanted, f"{what}: {got}, not {wanted}"
    setting = f"TRACKING_NAME={NAME}" if named else "no TRACKING_NAME"
    return [(f"{what} ({setting})", str(got)) for what, (got, _) in found.items()]


def user(name: str, uri: str, secrets: Path) -> dict[str, str]:
    """A user by docker/add_user.sh; the environment of the user's jobs."""
    settings = {**os.environ, "SECRETS": str(secrets), "TRACKING_URI": uri}
    made = subprocess.run([DOCKER / "add_user.sh", name], env=settings, check=True, stdout=subprocess.PIPE, text=True)
    again = subprocess.run([DOCKER / "add_user.sh", name], env=settings, capture_output=True, text=True, check=False)
    assert again.returncode == 1 and "already exists" in again.stderr, again
    return dict(line.split("=", 1) for line in made.stdout.split())


def jobs(folder: Path, uri: str, anna: dict[str, str]) -> list[tuple[str, str]]:
    """A two-process pre-training and a probe of it by run id from another folder; and one with a wrong password."""
    shards = make_shards(folder, 8)
    settings = ["--recipe", "smoke", "--data.shards", str(shards), "--tracking.uri", uri, "--run.steps", str(STEPS)]
    with environment(anna):
        trained = pretrain(folder, *settings, "--run.output_dir", "run", processes=2)
        assert trained.returncode == 0, trained.stderr[-2000:]
        run_id = client(uri, anna).search_runs(_experiments(uri, anna))[0].info.run_id
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        command = [sys.executable, "-m", "ca2cl", "probe", "--encoder", run_id, "--tracking.uri", uri]
        command += ["--train", str(shards), "--test", str(shards), "--seeds", "1", "--imagenet", "false"]
        probed = start(command, elsewhere)
        assert probed.returncode == 0, probed.stderr[-2000:]
    with environment({**anna, "MLFLOW_TRACKING_PASSWORD": "wrong"}):
        command = [sys.executable, "-m", "ca2cl", "pretrain", *settings, "--run.output_dir", "refused"]
        refused = start(command, folder)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1, refused.stderr
    return [
        ("pretrain, 2 processes, user and password", f"exit code {trained.returncode}, run {run_id}"),
        ("probe by run id, other working directory", f"exit code {probed.returncode}"),
        ("wrong password", f"exit code {refused.returncode}: {refused.stderr.strip()}"),
    ]


@contextmanager
def environment(changes: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def client(uri: str, who: dict[str, str]):  # type: ignore[no-untyped-def]  # MlflowClient, imported late: it takes seconds
    from mlflow import MlflowClient

    os.environ.update(who)
    return MlflowClient(uri)


def _experiments(uri: str, who: dict[str, str]) -> list[str]:
    return [experiment.experiment_id for experiment in client(uri, who).search_experiments()]


def contents(uri: str, who: dict[str, str]) -> dict[str, object]:
    """Runs, numbers, artifacts read back through the server, and registered models."""
    from mlflow.artifacts import download_artifacts

    ask = client(uri, who)
    runs = ask.search_runs(_experiments(uri, who))
    versions = ask.search_model_versions("name='ca2cl-encoder'")
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"], runs
    trained = next(run for run in runs if run.info.run_id == versions[0].run_id)
    metric = next(name for name in trained.data.metrics if name.endswith("loss"))
    assert len(ask.get_metric_history(trained.info.run_id, metric)) == STEPS
    assert trained.info.artifact_uri.startswith("mlflow-artifacts:/"), trained.info.artifact_uri
    assert ask.get_model_version_by_alias("ca2cl-encoder", "latest").version == versions[0].version
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for run in runs:
            download_artifacts(run_id=run.info.run_id, dst_path=folder, tracking_uri=uri)
        download_artifacts("models:/ca2cl-encoder@latest", dst_path=folder, tracking_uri=uri)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        weights = [path for path in files if path.name == "encoder.safetensors"]
        assert weights and all(path.stat().st_size > 40e6 for path in weights), weights
        size = sum(path.stat().st_size for path in files)
    return {"runs": len(runs), "models": len(versions), "artifacts": len(files), "bytes": size}


def rights(uri: str, ben: dict[str, str]) -> tuple[str, str]:
    """Another user sees the runs, and cannot remove them."""
    from mlflow.exceptions import MlflowException

    ask = client(uri, ben)
    run = ask.search_runs(_experiments(uri, ben))[0]
    try:
        ask.delete_run(run.info.run_id)
    except MlflowException as error:
        assert error.error_code == "PERMISSION_DENIED", error
        return ("another user", "reads the run, may not delete it")
    raise AssertionError("a user deleted another's run")


def backup(folder: Path, postgres: Postgres, seaweed: Service) -> None:
    """docker/backup.sh: save, everything removed, restore. MLflow is stopped; what it runs in containers runs here."""
    data, programs, saved = folder / "seaweedfs" / "data", folder / "programs", folder / "backup"
    programs.mkdir()
    (programs / "docker").write_text(IN_PLACE_OF_DOCKER)
    (programs / "docker").chmod(0o755)
    path = f"{programs}{os.pathsep}{postgres.programs}{os.pathsep}{os.environ['PATH']}"
    script = partial(subprocess.run, env={**postgres.environment, "PATH": path, "DATA": str(data)}, text=True)
    seaweed.stop()
    script([DOCKER / "backup.sh", "save", saved], check=True)
    assert script([DOCKER / "backup.sh", "save", saved], check=False).returncode == 2, "it would have replaced a backup"
    subprocess.run(["find", data, "-mindepth", "1", "-delete"], check=True)
    for database in DATABASES:
        postgres.run("dropdb", "--maintenance-db=postgres", database)
    artifacts = (saved / "artifacts.tar").read_bytes()
    (saved / "artifacts.tar").write_bytes(artifacts[:-1])
    refused = script([DOCKER / "backup.sh", "restore", saved], check=False, capture_output=True)
    assert refused.returncode == 2 and "nothing was changed" in refused.stderr, refused
    (saved / "artifacts.tar").write_bytes(artifacts)
    script([DOCKER / "backup.sh", "restore", saved], check=True)
    seaweed.start()


if __name__ == "__main__":
    assert Path.cwd() == ROOT, "run it by tests/deploy/tracking.sh"
    sys.exit(main())
