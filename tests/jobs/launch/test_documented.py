"""What the documented launcher commands start: their processes join, or say in one line why not."""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from accelerate.commands import launch
from torch.distributed.distributed_c10d import PrefixStore

from ca2cl.cli.parser import parse
from ca2cl.errors import InputError, LocalError
from ca2cl.runtime import accelerator
from ca2cl.runtime.accelerator import _meet, check_joined
from ca2cl.runtime.launched import Place, find_place, keeps_to_cpu, under_deepspeed, unseen_gpus
from tests.support.forked import on_ranks
from tests.support.jobs import CONFIGS, ROOT, as_printed, environment_of, make_shards, start

DOCUMENTS = ("README.md", "docs", "launch", "accelerate_configs", "ca2cl/cli/launch.py")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHED, "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("config", "processes", "here", "on_cpu", "zero"),
    [
        ("cpu", 4, 4, True, None),
        ("single_gpu", 1, 1, False, None),
        ("multi_gpu", 8, 8, False, None),
        ("multi_node", 16, 8, False, None),
        ("deepspeed_zero1", 8, 8, False, "1"),
        ("deepspeed_zero2", 8, 8, False, "2"),
    ],
)
def test_a_configuration_file_starts_what_it_says(
    config: str, processes: int, here: int, on_cpu: bool, zero: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = ["--main_process_ip", "127.0.0.1"] if config == "multi_node" else []
    file = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", str(processes)]
    started, environment = environment_of([*file, *nodes, "-m", "ca2cl", "pretrain"])
    assert started == here
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert keeps_to_cpu() == on_cpu
    assert under_deepspeed() == (zero is not None)
    assert environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == zero
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def printed() -> list[str]:
    """Every launcher command that a document prints, without its line breaks."""
    roots = [ROOT / name for name in DOCUMENTS]
    command = re.compile(r"^[ #]*(?:exec )?(?:--env-file \S+ )?((?:accelerate|ca2cl) launch --.*)$", re.MULTILINE)
    found = []
    for path in (path for root in roots for path in (root, *root.rglob("*")) if path.is_file()):
        found += command.findall(re.sub(r"\\\n[#\s]*", "", path.read_text(encoding="utf-8", errors="replace")))
    return sorted(set(found))


def test_every_printed_command_is_one_that_accelerate_and_the_verb_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = printed()
    assert len(commands) >= 12, commands
    for command in commands:
        plain = command.replace("/opt/ca2cl/", "").replace('"$((NODES * GPUS))"', "16").replace('"$NODES"', "2")
        words = [word for word in shlex.split(plain, comments=True)[2:] if word not in ("...", "$@")]
        words = ["1" if before == "--machine_rank" else word for before, word in zip(["", *words], words, strict=False)]
        args, _, _ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
        assert args.multi_gpu or args.use_deepspeed or args.num_processes == 1, command
        assert args.module and args.training_script == "ca2cl", command
        if "..." not in command and "$@" not in command:
            verb, *settings = args.training_script_args
            if verb == "reproduce":
                verb, settings = f"{verb} {settings[0]}", settings[1:]
            assert parse(verb, settings) is not None, command


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    make_shards(folder, 8, seed=0)
    make_shards(folder, 4, seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "verb",
    [
        "doctor --shards shards-0 --batch_size 32 --lanes 8 --image_size 32",
        "pretrain --recipe smoke --data.shards shards-0 --run.output_dir OUT --run.steps 2",
        "embed --encoder random shards-0 OUT.parquet",
        "probe --encoder random --train shards-0 --test shards-1 --labels 1.0 --seeds 1 --classifiers linear",
        "finetune --encoder random --train shards-0 --test shards-1 --output_dir OUT --labels 4 --seeds 1 --epochs 1 "
        "--min_steps 1 --batch_size 16 --image_size 32",
    ],
    ids=lambda verb: verb.split()[0],
)
def test_a_verb_runs_in_two_processes_by_the_printed_command(shards: Path, verb: str) -> None:
    name = verb.split()[0]
    done = as_printed(
        f"accelerate launch --config_file accelerate_configs/cpu.yaml --num_processes 2 -m ca2cl {verb}".replace(
            "OUT", f"out-{name}"
        ),
        shards,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_command_at_a_files_head_joins_its_processes(path: Path, tmp_path: Path) -> None:
    """As printed, but for the count of processes and the verb; several machines need several machines."""
    if path.stem == "multi_node":
        pytest.skip("see tests/jobs/pretrain/test_engines.py")
    count = "" if path.stem == "single_gpu" else " --num_processes 2"
    deepspeed = {"DS_ACCELERATOR": "cpu"} if "deepspeed" in path.stem else {}
    command = f"accelerate launch --config_file accelerate_configs/{path.name}{count} -m ca2cl doctor"
    done = as_printed(command, tmp_path, **deepspeed)
    assert done.returncode == 0, done.stderr
    assert ("2 ranks agree" in done.stdout) == bool(count), done.stdout
    assert done.stdout.count("verdict") == 1


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "not set: RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "not set: LOCAL_RANK;"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "--config_file accelerate_configs/cpu.yaml"),
    ],
)
def test_what_no_launcher_sets_is_told(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LocalError, match=re.escape(message)):
        find_place()


@pytest.mark.parametrize(
    "variables",
    [{}, {"LOCAL_RANK": "0"}, {"RANK": "7"}, {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, {"PMI_SIZE": "4"}],
)
def test_what_is_left_over_of_a_launch_means_nothing(
    variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert find_place() == Place(0, 1, 0, 1)


def test_one_process_trains_alone_whatever_is_left_over(tmp_path: Path) -> None:
    script = (
        "from ca2cl.runtime.accelerator import build_accelerator as b\n"
        "a = b(); print(a.num_processes, a.device, a.distributed_type)"
    )
    left = {"RANK": "3", "LOCAL_RANK": "1", "PMI_SIZE": "4", "OMPI_COMM_WORLD_SIZE": "4"}
    done = start([sys.executable, "-c", script], tmp_path, **left)
    assert done.stdout.split() == ["1", "cpu", "DistributedType.NO"], done.stderr


def test_accelerate_joins_no_part_of_a_launch() -> None:
    check_joined(Place(1, 2, 1, 2), 2)
    with pytest.raises(LocalError, match="WORLD_SIZE is 2, but accelerate joined 1"):
        check_joined(Place(1, 2, 1, 2), 1)


class LateStore(PrefixStore):
    """A rank that reads half a second after the others."""

    def multi_get(self, keys: list[str]) -> list[bytes]:
        time.sleep(0.5)
        return super().multi_get(keys)


def meet(rank: int, folder: str) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    if rank == 1:
        accelerator.PrefixStore = LateStore  # type: ignore[misc]
    try:
        _meet(Place(rank, 2, rank, 2), rank == 0, timedelta(seconds=60))
    except InputError as error:
        Path(folder, str(rank)).write_text(str(error))


def test_a_gpu_and_a_cpu_do_not_wait_for_each_other(tmp_path: Path) -> None:
    """A machine whose driver is gone, beside one that has it: rank 0 here says that it has a GPU."""
    on_ranks(meet, 2, str(tmp_path))
    told = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert told[0] == told[1] and re.match(r"rank 0 has a GPU on .*, but rank 1 has a CPU on ", told[0])


def test_a_gpu_without_a_driver_is_seen_on_the_bus(tmp_path: Path) -> None:
    for number, (vendor, kind) in enumerate([("0x10de", "0x030200"), ("0x10de", "0x040300"), ("0x8086", "0x030000")]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "vendor").write_text(f"{vendor}\n")
        (tmp_path / str(number) / "class").write_text(f"{kind}\n")
    assert unseen_gpus(tmp_path) == 1
    assert unseen_gpus(tmp_path / "nowhere") == 0
