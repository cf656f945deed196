"""Processes that a launcher started, and others: who they are told apart by, and which of them speaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.cli.verbs import VERBS
from ca2cl.runtime.lifetime import is_launcher


def test_what_a_launcher_is() -> None:
    for line in (
        "/env/bin/python /env/bin/accelerate launch --num_processes 1 -m ca2cl pretrain",
        "python -u -m accelerate.commands.launch -m ca2cl pretrain",
        "/env/bin/python3.11 /env/bin/torchrun --nproc_per_node 2 train.py",
        "python -m torch.distributed.run train.py",
        "/env/bin/python /env/bin/ca2cl launch --num_processes 8 -m ca2cl pretrain",
        "python -m ca2cl quickstart",
    ):
        assert is_launcher(line.split()), line
    for line in ("-bash", "bash train.sh", "sh -c x", "nohup ca2cl pretrain", "python -m ca2cl pretrain", "python", ""):
        assert not is_launcher(line.split()), line
    assert not is_launcher(["sh", "-c", "accelerate launch -m ca2cl pretrain"])


def test_every_verb_says_what_ctrl_c_leaves(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pressed(name: str, arguments: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ca2cl.cli.entry.parse", pressed)
    for name in VERBS:
        if not VERBS[name].raw:
            assert main(name.split()) == 130
            (line,) = capsys.readouterr().err.splitlines()
            assert line == f"ca2cl: stopped by Ctrl-C; {VERBS[name].kept}"


JOINED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
POD = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-0", "MASTER_PORT": "23456"}  # as training operators set it


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "x"}, POD, {"WORLD_SIZE": "2", "RANK": "1"}])
@pytest.mark.parametrize(
    "arguments", ["shard nowhere out", "encoders show nowhere", "pretrain --no_such 1", "launch --config_file no.yaml"]
)
def test_a_process_that_no_launcher_started_speaks(
    variables: dict[str, str], arguments: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:  # fmt: skip
    """kubeflow/trainer#1790: RANK is the pod's number there, for everything that runs in it."""
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(arguments.split()) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("ca2cl: error: "), line


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ("pretrain --no_such 1", 2, []),
        ("launch --config_file no.yaml", 2, ["ca2cl: error: "]),
        ("shard nowhere out", 0, ["ca2cl: rank 1 leaves shard to rank 0"]),
    ],
)
def test_a_job_says_a_thing_once(
    arguments: str, code: int, told: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in JOINED.items():
        monkeypatch.setenv(name, value)
    assert main(arguments.split()) == code
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(told) and all(map(str.startswith, lines, told)), lines
