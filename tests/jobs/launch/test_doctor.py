"""The doctor finds what is wrong, names a remedy, and says when nothing is."""

from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.doctor import machine
from ca2cl.doctor.finding import Finding, as_text
from tests.support.forked import ca2cl
from tests.support.jobs import as_printed, make_shards
from tests.support.ports import free_port

LAUNCHED = "accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 -m ca2cl doctor"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("doctor"), 10)


def examine(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(["doctor", *arguments])
    return code, capfd.readouterr().out


def test_a_sound_job_is_called_sound_with_its_numbers(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = examine(
        capfd, "--shards", str(shards), "--batch_size", "32", "--lanes", "8", "--processes", "2", "--image_size", "32"
    )
    assert code == 0 and "verdict: nothing is wrong" in out, out
    assert "90 tiles in 5 shards = 8 lanes of 11; a batch of 32 takes 4 of each lane" in out
    assert "2 steps an epoch leave out 26 tiles; each of 2 processes reads 4 lanes" in out
    for area in ("versions", "devices", "bf16", "fp16", "shared memory", "MLflow", "reading", "views, step"):
        assert any(area in line for line in out.splitlines()), area


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--shards", "nowhere"), "nowhere/manifest.json: no manifest here"),
        (("--tracking_uri", "http://127.0.0.1:9"), "connection refused"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(
    arguments: tuple[str, ...], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out = examine(capfd, *arguments)
    assert code == 1 and "1 to mend" in out, out
    lines = out.splitlines()
    (number,) = [n for n, line in enumerate(lines) if line.startswith("WRONG")]
    assert text in lines[number] and lines[number + 1].lstrip().startswith("-> ")


def test_processes_that_do_not_divide_the_lanes_are_wrong(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out = examine(capfd, "--shards", str(shards), "--batch_size", "32", "--lanes", "8", "--processes", "3")
    assert code == 1 and "3 processes cannot share them evenly" in out, out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--micro_batch_size", "16"), "under model.norm sync BatchNorm sees one micro-batch at a time"),
        (("--norm", "lane_group"), "blocks of 4 groups, 64 tiles"),
        (
            ("--accumulation", "bitwise", "--norm", "frozen", "--norm_group", "4", "--micro_batch_size", "8"),
            "use --model",
        ),
    ],
)
def test_a_batch_that_is_not_shared_out_as_promised_is_wrong(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], text: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out = examine(capfd, "--shards", str(shards), "--batch_size", "32", "--lanes", "8", *arguments)
    assert code == 1 and text in out, out


def test_a_small_shared_memory_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SHARED", 1 << 60)
    assert machine.shared_memory().state == "wrong"
    monkeypatch.setattr(machine, "_SHARED", 0)
    assert machine.shared_memory().state == "ok"


def test_every_wrong_has_a_remedy_and_the_verdict_counts_them() -> None:
    with pytest.raises(AssertionError):
        Finding("disk", "wrong", "full")
    text = as_text([Finding("disk", "wrong", "full", "free some"), Finding("time", "note", "late")])
    assert text.endswith("verdict: 1 to mend: disk\n") and "-> free some" in text


def test_the_ranks_of_a_launch_meet_are_listed_and_one_measures_the_step(tmp_path: Path, shards: Path) -> None:
    """By the command of README and of the file's head, in an environment without variables of the tests' own.

    One rank measures alone, whatever rates it finds on a busy machine: a step waits for every rank of its group.
    """
    done = as_printed(f"{LAUNCHED} --shards {shards} --batch_size 16 --lanes 8 --image_size 32", tmp_path)
    assert (done.returncode == 0) == ("nothing is wrong" in done.stdout), done.stderr
    assert "rank 0" in done.stdout and "rank 1" in done.stdout and "2 ranks agree" in done.stdout, done.stderr
    assert "a step of resnet18" in done.stdout and done.stdout.count("verdict") == 1


def test_ranks_that_do_not_meet_say_so(tmp_path: Path) -> None:
    """Rank 1 of two, alone: nobody listens where it looks for rank 0."""
    environment = {
        "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    done = ca2cl(tmp_path, "doctor", "--patience", "3", **environment)
    told_lines = [line for line in done.stderr.splitlines() if line.startswith("ca2cl: error (rank 1)")]
    assert done.returncode == 2 and len(told_lines) == 1, done.stderr
    assert "does not meet the others within 3 s" in told_lines[0] and "GLOO_SOCKET_IFNAME" in told_lines[0]
