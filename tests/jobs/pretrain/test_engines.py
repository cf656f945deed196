"""A run is the same to the last bit on every engine that a shipped launcher configuration starts, across hosts too."""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.support.jobs import CONFIGS, LAUNCH, ROOT, make_shards, pretrain, training_lines
from tests.support.ports import free_port

NORM = ("--model.norm", "lane_group", "--model.norm_group", "2", "--run.batch_size", "32")
KIND = ("--run.accumulation", "bitwise", "--optim.schedule", "constant", *NORM)
JOB = ("--recipe", "smoke", "--tracking.register_as", "null", "--run.steps", "2", *KIND)
SGD, ADAM = {"momentum_buffer"}, {"exp_avg", "exp_avg_sq", "step"}
needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("engines"), 10)


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process that holds every batch at once."""
    folder = tmp_path_factory.mktemp("one")
    done = pretrain(folder, *JOB, "--data.shards", str(shards), "--run.output_dir", "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


def compare(expected: Path, found: Path) -> None:
    """Every bit of the weights and running statistics; the losses are sums of double precision."""
    lines = training_lines(expected)
    assert len(lines) == 2
    for a, b in zip(lines, training_lines(found), strict=True):
        for name in ("loss", "nt_xent", "cluster", "nt_xent_adversarial"):
            assert b[name] == pytest.approx(a[name], rel=1e-14), (name, a["step"])
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)  # in fp32, each in its own order
    ours, theirs = (
        load_file(run / "checkpoints" / "step-000000002" / "model.safetensors") for run in (expected, found)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(theirs[name], value), name


@pytest.mark.parametrize(
    ("config", "processes", "micro_batch"),
    [
        pytest.param(None, 2, 8, id="cpu-2-8"),
        pytest.param("cpu", 4, 8, marks=pytest.mark.slow),
        pytest.param("multi_gpu", 2, 16, marks=pytest.mark.slow),  # cpu's engine on CPUs: DistributedDataParallel
        pytest.param("deepspeed_zero1", 2, 16, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero2", 2, 16, marks=[needs_deepspeed, pytest.mark.slow]),
        pytest.param("deepspeed_zero2", 2, 8, marks=needs_deepspeed),
    ],
)
def test_every_engine_gives_the_run_of_one_process(
    shards: Path, expected: Path, tmp_path: Path, config: str | None, processes: int, micro_batch: int
) -> None:
    done = pretrain(
        tmp_path, *JOB, "--data.shards", str(shards), "--run.output_dir", "run",
        "--run.micro_batch_size", str(micro_batch), processes=processes, config=config,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compare(expected, tmp_path / "run")


@pytest.mark.parametrize("engine", [None, pytest.param("deepspeed_zero2", marks=[needs_deepspeed, pytest.mark.slow])])
def test_statistics_over_all_processes_are_the_same_on_any_number_of_them(
    shards: Path, tmp_path: Path, engine: str | None
) -> None:
    for run, processes, config in [("one", 1, None), ("two", 2, engine)]:
        done = pretrain(
            tmp_path, *JOB, "--model.norm", "sync", "--data.shards", str(shards), "--run.output_dir", run,
            processes=processes, config=config,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    compare(tmp_path / "one", tmp_path / "two")


@needs_deepspeed
@pytest.mark.parametrize(
    ("optimizer", "engines", "moments"),
    [
        ("sgd", (("deepspeed_zero2", 2), (None, 2)), SGD),
        pytest.param("adamw", (("cpu", 2), ("deepspeed_zero1", 2)), ADAM, marks=pytest.mark.slow),
        pytest.param("adamw", (("deepspeed_zero2", 4), ("cpu", 2)), ADAM, marks=pytest.mark.slow),
        pytest.param("adamw", (("cpu", 2), ("deepspeed_zero2", 4)), ADAM, marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_from_one_engine_to_another(
    shards: Path, expected: Path, tmp_path: Path, optimizer: str, engines: tuple[tuple[str | None, int], ...],
    moments: set[str],
) -> None:  # fmt: skip
    """A step on each of two engines, of as many processes or of others, ends with the weights and the optimizer's state
    of two steps on one."""
    common = (*JOB, "--optim.name", optimizer, "--data.shards", str(shards))
    runs = [("parts", 1, engines[0]), ("parts", 2, engines[1])]
    if optimizer == "sgd":  # the recipe's
        shutil.copytree(expected, tmp_path / "whole")
    else:
        runs += [("whole", 2, (None, 2))]
    for run, step, (config, processes) in runs:
        done = pretrain(
            tmp_path, *common, "--run.output_dir", run, "--run.steps", str(step), processes=processes, config=config
        )
        assert done.returncode == 0, done.stderr
    for file in ("model", "optimizer"):
        ours, theirs = (
            load_file(tmp_path / run / "checkpoints" / "step-000000002" / f"{file}.safetensors")
            for run in ("whole", "parts")
        )
        assert ours.keys() == theirs.keys()
        assert file == "model" or {name.split("/")[0] for name in ours} == moments
        for name, value in ours.items():
            assert torch.equal(theirs[name], value), name


@needs_deepspeed
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--optim.name", "lars"), "optim.name is 'lars'"),
    ],
)
def test_what_deepspeed_cannot_do_is_one_line(
    shards: Path, tmp_path: Path, arguments: tuple[str, str], message: str
) -> None:
    done = pretrain(
        tmp_path, *JOB, *arguments, "--data.shards", str(shards), "--run.output_dir", "run", config="deepspeed_zero1"
    )
    told = [line for line in done.stderr.splitlines() if line.startswith("ca2cl: error")]
    assert done.returncode != 0 and len(told) == 1 and message in told[0], done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_launcher_configuration_says_when_to_use_it_and_decides_no_precision(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ") and f"ca2cl launch --config_file accelerate_configs/{path.name}" in text
    assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Two network namespaces with an address each and a wire between them: {name: address}."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = f"c{os.getpid() % 100000}"
    names = [f"{tag}a", f"{tag}b"]
    wires = [f"{tag}v", f"{tag}w"]
    found = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    if subprocess.run(["ip", "netns", "add", names[0]], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody make network namespaces")
    try:
        subprocess.run(["ip", "netns", "add", names[1]], check=True)
        subprocess.run(["ip", "link", "add", wires[0], "type", "veth", "peer", "name", wires[1]], check=True)
        for name, wire in zip(names, wires, strict=True):
            inside = ["ip", "netns", "exec", name, "ip"]
            subprocess.run(["ip", "link", "set", wire, "netns", name], check=True)
            subprocess.run([*inside, "addr", "add", f"{found[name]}/24", "dev", wire], check=True)
            subprocess.run([*inside, "link", "set", wire, "up"], check=True)
            subprocess.run([*inside, "link", "set", "lo", "up"], check=True)
        yield found
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


@pytest.mark.slow
def test_two_hosts_give_the_run_of_one_process(
    shards: Path, expected: Path, tmp_path: Path, hosts: dict[str, str]
) -> None:
    """2 x 2 processes over TCP, through multi_node.yaml; what differs from host to host is on its command line."""
    first = next(iter(hosts.values()))
    port, jobs = free_port(), []
    for rank, (name, _) in enumerate(hosts.items()):
        wire = subprocess.run(
            ["ip", "netns", "exec", name, "ip", "-json", "link"], check=True, capture_output=True, text=True
        )
        (device,) = [link["ifname"] for link in json.loads(wire.stdout) if link["ifname"] != "lo"]
        command = [
            "ip", "netns", "exec", name, *LAUNCH, "--config_file", str(CONFIGS / "multi_node.yaml"),
            "--num_machines", "2", "--num_processes", "4", "--machine_rank", str(rank), "--main_process_ip", first,
            "--main_process_port", str(port), "--dynamo_backend", "no", "-m", "ca2cl", "pretrain", *JOB,
            "--data.shards", str(shards), "--run.output_dir", "run", "--run.micro_batch_size", "8",
        ]  # fmt: skip
        env = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": device,
        }  # fmt: skip
        env.pop("MLFLOW_TRACKING_URI", None)
        jobs.append(
            subprocess.Popen(
                command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        errors = [job.communicate(timeout=240)[1] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    compare(expected, tmp_path / "run")
