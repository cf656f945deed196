"""``ca2cl study`` on made-up tissue: real trainings and probes, stopped in every way, shared, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from ca2cl.cli import main
from ca2cl.study import children
from ca2cl.study.comparison import read_rows
from ca2cl.study.jobs import Job, all_jobs, progress
from tests.support.forked import Forked
from tests.support.jobs import CONFIGS, ROOT, make_shards, training_lines

STUDY = """
seeds: {seeds}
{length}
settings: {{run: {{checkpoint_every: 5, figures_every: 0}}}}
recipes:
  full: {{recipe: smoke}}
  plain: {{recipe: smoke, method: {{name: simclr}}}}
probe: {{labels: [1.0], seeds: 1, classifiers: [knn], workers: 0}}
"""
DATA = ("--shards", "shards-0", "--test", "shards-1", "--output_dir", "out", "--tracking.root", "store")
VERB = ("study", "small.yaml", *DATA)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    make_shards(folder, 8, seed=0)
    make_shards(folder, 4, seed=1)
    return folder


def prepare(folder: Path, tiles: Path, seeds: int = 1, length: str = "steps: 3") -> Path:
    """A folder with a study's file and its data."""
    for name in ("shards-0", "shards-1"):
        if not (folder / name).exists():
            (folder / name).symlink_to(tiles / name)
    (folder / "small.yaml").write_text(STUDY.format(seeds=seeds, length=length))
    return folder


def run_here(folder: Path, *more: str) -> tuple[int, list[Sequence[str]]]:
    """The verb in this process, its jobs in forked ones; the exit code, and the commands of the jobs."""
    started: list[Sequence[str]] = []

    def start(command: Sequence[str], *, env: Mapping[str, str]) -> Forked:
        assert env["CA2CL_PART"] == "1"
        started.append(command)
        return Forked(folder, *command[command.index("ca2cl") + 1 :], **{children.PART: env[children.PART]})

    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setattr(children, "Popen", start)
        before = [(number, signal.getsignal(number)) for number in children._PASSED_ON]
        try:
            return main([*VERB, *more]), started
        finally:
            for number, handler in before:
                signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tiles: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that ran through, its second job first."""
    folder = prepare(tmp_path_factory.mktemp("whole"), tiles)
    code, started = run_here(folder, "--job", "1")
    assert code == 0 and len(started) == 2
    assert not (folder / "out" / "study.txt").exists()  # job 0 is not done
    code, started = run_here(folder)
    assert code == 0 and [command[command.index("ca2cl") + 1] for command in started] == ["pretrain", "probe"]
    return folder


def jobs_of(folder: Path, seeds: int = 1) -> list[Job]:
    steps = json.loads((folder / "out" / "study.json").read_text())["steps"]
    return all_jobs(folder / "out", steps, seeds)


def test_every_run_is_an_ordinary_one_with_its_probe(whole: Path) -> None:
    jobs = jobs_of(whole)
    assert [job.folder.relative_to(whole / "out").as_posix() for job in jobs] == ["full/seed-0", "plain/seed-0"]
    for job in jobs:
        assert job.done() and progress(job.folder) == (3, "FINISHED")
        params = json.loads((job.folder / "run.json").read_text())["params"]
        assert (params["run.seed"], params["run.steps"], params["run.epochs"]) == ("0", "3", "None")
        assert params["method.name"] == {"full": "ca2cl", "plain": "simclr"}[job.recipe]
        assert all(line["cpu_s"] > 0 for line in training_lines(job.folder))
    floors = {row.name for row in read_rows(jobs) if row.floor}
    assert floors == {"colour histogram", "random encoder"}
    probes = [json.loads(job.probe.read_text()) for job in jobs]
    assert [len(probe["results"]) for probe in probes] == [3, 1]  # the floors stand in the first one


def test_the_table_says_what_it_shows(whole: Path) -> None:
    out = whole / "out"
    found = json.loads((out / "study-results.json").read_text())
    assert found["runs"] == {"finished": 2, "of": 2} and found["planned"]["steps"] == {"full": 3, "plain": 3}
    assert "one seed says nothing about the spread between seeds" in found["summary"]
    assert [one["recipe"] for one in found["compute"]] == ["full", "plain"]
    assert all(one["minutes"] > 0 and one["clock"] == "cpu" for one in found["compute"])
    text = (out / "study.txt").read_text()
    assert found["summary"] in text and "colour histogram" in text and "CPU h" in text
    lines = (out / "study.csv").read_text().splitlines()
    assert len(lines) == 1 + 4 and lines[1].startswith("full,0,,k-NN,1.0,72,")
    assert (out / "study.png").stat().st_size > 10_000
    assert found["leaks"] == [] and "LEAK" not in text


def test_all_runs_are_nested_below_the_studys(whole: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{whole}/store/mlflow.db")
    parent = client.get_run(json.loads((whole / "out" / "mlflow-run.json").read_text())["run_id"])
    assert parent.info.status == "FINISHED" and parent.data.tags["ca2cl.kind"] == "study"
    assert parent.data.params["plain.method.name"] == "simclr" and parent.data.params["full.steps"] == "3"
    (row,) = [row for row in read_rows(jobs_of(whole)) if row.name == "plain"]
    assert parent.data.metrics["plain/k-NN/100pct/accuracy"] == pytest.approx(row.scores["accuracy"][0])
    names = {file.path for file in client.list_artifacts(parent.info.run_id)}
    assert {"study.txt", "study.csv", "study.png", "study-results.json", "study.json"} <= names
    nested = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(nested) == 4 and sum(run.data.tags.get("ca2cl.kind") == "probe" for run in nested) == 2
    assert {run.info.run_name for run in nested} >= {"small: full seed 0", "small: plain seed 0"}


def test_a_second_start_has_nothing_to_do_and_logs_nothing(whole: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = (whole / "out" / "mlflow-run.json").read_bytes(), (whole / "out" / "study-results.json").read_bytes()
    assert run_here(whole) == (0, [])
    assert before == (
        (whole / "out" / "mlflow-run.json").read_bytes(),
        (whole / "out" / "study-results.json").read_bytes(),
    )
    assert run_here(whole, "--list") == (0, [])
    assert [line.split()[-1] for line in capfd.readouterr().out.splitlines()[-2:]] == ["done", "done"]


def test_another_study_is_refused_and_more_seeds_are_not(
    whole: Path, tiles: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for length, change in (("steps: 4", "steps 3 -> 4"), ("minutes: 1", "minutes None -> 1.0, steps 3 -> None")):
        prepare(whole, tiles, length=length)
        assert run_here(whole)[0] == 2
        assert f"holds another job ({change})" in capfd.readouterr().err
    prepare(whole, tiles)
    assert run_here(whole, "--job", "2")[0] == 2
    assert "job is 2: the study has 2 jobs, 0 to 1" in capfd.readouterr().err
    assert run_here(whole, "--test", "shards-0")[0] == 2
    assert "probe.test" in capfd.readouterr().err
    prepare(whole, tiles, seeds=2)
    assert run_here(whole, "--list")[0] == 0
    assert [line.split()[-1] for line in capfd.readouterr().out.splitlines()[-2:]] == ["do", "do"]
    prepare(whole, tiles)


def test_a_leak_stands_under_the_table(whole: Path, tmp_path: Path, tiles: Path) -> None:
    """A probe that found test tiles among the training tiles."""
    shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    folder = prepare(tmp_path / "copy", tiles)
    probe = folder / "out" / "plain" / "seed-0" / "probe.json"
    content = json.loads(probe.read_text())
    content["tests"]["shards-1"]["leak"]["equal_test_tiles"] = 5
    probe.write_text(json.dumps(content))
    assert run_here(folder, "--table") == (0, [])
    (line,) = json.loads((folder / "out" / "study-results.json").read_text())["leaks"]
    assert line.startswith("LEAK: 5 of 36 test tiles are training tiles too")
    assert line in (folder / "out" / "study.txt").read_text()


def test_a_signal_reaches_the_child_and_names_the_exit_code(tmp_path: Path) -> None:
    """A shell stands for a training: it writes a file when the signal comes, and ends with 85."""
    code = f"""
import sys
from ca2cl.study.children import Children, Stopped
try:
    Children().install().run(["sh", "-c", "trap 'echo > {tmp_path}/kept; exit 85' TERM USR1; echo > {tmp_path}/on; "
                              "while :; do sleep 0.05; done"])
except Stopped as stopped:
    sys.exit(stopped.code)
"""
    for number, wanted in ((signal.SIGTERM, 85), (signal.SIGUSR1, 85)):
        study = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)})
        until(lambda: (tmp_path / "on").exists(), study)
        study.send_signal(number)
        assert study.wait(120) == wanted and (tmp_path / "kept").exists()
        for name in ("on", "kept"):
            (tmp_path / name).unlink()


def test_what_a_command_ends_with() -> None:
    runner = children.Children()
    assert runner.run(["sh", "-c", "exit 3"]) == 3 and runner.run(["true"]) == 0
    assert runner.run(["sh", "-c", "kill -9 $$"]) == 128 + 9
    with pytest.raises(children.Stopped) as stopped:  # the scheduler signalled the child alone
        runner.run(["sh", "-c", "exit 85"])
    assert stopped.value.code == 85


def until(true: Callable[[], Any], process: subprocess.Popen[Any], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, process.returncode
        time.sleep(0.05)


Starter = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def started() -> Iterator[Starter]:
    """Starts the verb as a user does; what a failed test leaves running is ended, and so are its jobs."""
    made: list[subprocess.Popen[str]] = []

    def start(folder: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, "-m", "ca2cl", *VERB, *more]
        made.append(
            subprocess.Popen(
                command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
        )
        return made[-1]

    yield start
    for process in made:
        process.kill()
        process.wait()


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=1500)
    return process.returncode, text


@pytest.mark.slow
def test_equal_minutes_stopped_killed_and_gone_on_with(tiles: Path, tmp_path: Path, started: Starter) -> None:
    folder = prepare(tmp_path, tiles, length="minutes: 0.1")
    study = started(folder)
    first = folder / "out" / "full" / "seed-0"
    until(lambda: progress(first)[0] >= 2, study)
    study.send_signal(signal.SIGTERM)
    code, text = finished(study)
    assert code == 85 and "stopping after this step with a checkpoint" in text and "the same command goes on" in text
    plan = (folder / "out" / "study.json").read_bytes()
    step, status = progress(first)
    assert step >= 2 and status == "KILLED"
    timing = json.loads(plan)["timing"]
    for name, steps in json.loads(plan)["steps"].items():
        assert steps == int(6.0 / timing[name]["seconds_a_step"]) and len(timing[name]["cpu_s"]) == 12
    assert not (folder / "out" / ".timing").exists()

    study = started(folder)  # killed: its child ends, too, and leaves the folder
    second = folder / "out" / "plain" / "seed-0"
    until(lambda: progress(second)[0] >= 2, study)
    study.kill()
    study.wait()
    until_status = time.monotonic() + 60
    while progress(second)[1] != "KILLED" and time.monotonic() < until_status:
        time.sleep(0.2)
    assert progress(second)[1] == "KILLED"

    code, text = finished(started(folder))
    assert code == 0, text
    assert (folder / "out" / "study.json").read_bytes() == plan
    for job in jobs_of(folder):
        assert [line["step"] for line in training_lines(job.folder)] == list(range(1, job.steps + 1))
        assert job.done()
    found = json.loads((folder / "out" / "study-results.json").read_text())
    assert [one["steps"] for one in found["compute"]] == [job.steps for job in jobs_of(folder)]
    assert found["planned"]["minutes"] == 0.1


@pytest.mark.slow
def test_two_at_once_share_the_jobs_and_a_store_that_is_away_loses_nothing(
    tiles: Path, tmp_path: Path, started: Starter
) -> None:
    folder = prepare(tmp_path, tiles, seeds=2)
    away = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    both = [started(folder, **away), started(folder, **away)]
    for code, text in map(finished, both):
        assert code == 0, text
        assert "not logged in MLflow" in text
    jobs = jobs_of(folder, 2)
    assert all(job.done() for job in jobs)
    for job in jobs:
        assert len(training_lines(job.folder)) == 3
    found = json.loads((folder / "out" / "study-results.json").read_text())
    assert found["runs"] == {"finished": 4, "of": 4} and not (folder / "out" / "mlflow-run.json").exists()
    assert len(found["differences"]) == 1 and found["differences"][0]["p_holm"] <= 1
    assert finished(started(folder, "--table"))[0] == 0  # the embedded store takes it later
    assert (folder / "out" / "mlflow-run.json").exists()


@pytest.mark.slow
def test_a_launcher_starts_the_processes_of_every_training(tiles: Path, tmp_path: Path, started: Starter) -> None:
    folder = prepare(tmp_path, tiles)
    launcher = f"ca2cl launch --config_file {CONFIGS / 'cpu.yaml'} --num_processes 2"
    code, text = finished(started(folder, "--launcher", launcher))
    assert code == 0, text
    for job in jobs_of(folder):
        assert json.loads((job.folder / "environment.json").read_text())["processes"] == 2
