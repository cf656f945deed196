"""Pre-training with other methods than CA2CL: SimCLR, and one of a user's own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ca2cl.cli import main
from tests.support.jobs import make_shards, training_lines


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("methods"), 10)


def pretrain(shards: Path, folder: Path, *arguments: str) -> int:
    """``ca2cl pretrain`` of two steps, in this process."""
    common = ("--recipe", "smoke", "--run.steps", "2", "--data.shards", str(shards))
    return main(["pretrain", *common, "--run.output_dir", str(folder), *arguments])


def test_simclr_pretrains_and_its_encoder_is_registered_and_probed(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parts = ("--run.micro_batch_size", "16", "--run.accumulation", "bitwise", "--model.norm", "frozen")
    assert pretrain(shards, tmp_path / "run", "--method.name", "simclr", *parts, "--model.norm_group", "2") == 0
    assert all(set(line) >= {"loss", "lr"} and "cluster" not in line for line in training_lines(tmp_path / "run"))
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == ["curves.png"]
    weights = load_file(tmp_path / "run" / "checkpoints" / "step-000000002" / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"encoder", "projector"}
    probe = ("--train", str(shards), "--test", str(shards), "--labels", "1.0", "--seeds", "1", "--imagenet", "false")
    assert main(["probe", "--encoder", "models:/ca2cl-encoder@latest", *probe, "--classifiers", "knn"]) == 0
    assert "k-NN" in capfd.readouterr().out


def test_a_run_does_not_go_on_with_another_method(
    shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor does one of the version that did not say: it was CA2CL's."""
    out, alone = tmp_path / "run", ("--tracking.register_as", "none", "--tracking.root", str(tmp_path / "store"))
    assert pretrain(shards, out, *alone) == 0
    told = json.loads((out / "run.json").read_text())
    assert told["params"].pop("method.name") == "ca2cl" and told["params"].pop("method.options") == "[]"
    (out / "run.json").write_text(json.dumps(told))
    assert pretrain(shards, out, *alone, "--method.name", "simclr") == 2
    assert "method.name ca2cl -> simclr" in capfd.readouterr().err
    assert pretrain(shards, out, *alone) == 0


TOY = """
from dataclasses import dataclass

import torch
from torch import nn

from ca2cl.methods.base import Method
from ca2cl.models.batch_norm import commit_statistics
from ca2cl.models.heads import EncoderNetwork


@dataclass(frozen=True)
class Options:
    momentum: float = 0.9


class Network(EncoderNetwork):
    def __init__(self, encoder):
        super().__init__(encoder)
        self.predictor, self.teacher = (nn.Linear(encoder.feature_dim, 8) for _ in range(2))
        self.teacher.requires_grad_(False)

    def heads(self, h):
        return self.predictor(h)


class Toy(Method):
    '''The student's head of one view predicts the teacher's of the other.'''

    options = Options
    counters = {"large": "losses above 1e-9"}
    curves = (("Distance", "", (("distance", ""),)),)

    def __init__(self, momentum):
        self.momentum = momentum

    @classmethod
    def from_settings(cls, settings):
        return cls(settings.options.momentum)

    def build(self, encoder):
        return Network(encoder)

    def step(self, engine, micro_batches):
        (views,) = micro_batches
        with torch.no_grad():
            target = engine.bare.teacher(engine.bare.encoder(views.x2))
        distance = (engine.network(views.x1, None, 0) - target).square().mean()
        with engine.micro_step(last=True):
            engine.backward(distance)
        commit_statistics(engine.bare)
        distance = distance.detach()
        return {"distance": distance, "loss": distance, "large": (distance > 1e-9).float()}

    def after_step(self, network, step, total_steps):
        with torch.no_grad():
            for mine, its in zip(network.teacher.parameters(), network.predictor.parameters()):
                mine.lerp_(its, 1 - self.momentum)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, ...]]:
    """Flags of a job with the toy, whose one file lies in a folder of the user's."""
    (tmp_path / "toy_method.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    yield (
        "--method.name",
        "toy_method:Toy",
        "--tracking.register_as",
        "none",
        "--tracking.root",
        str(tmp_path / "store"),
    )
    sys.modules.pop("toy_method", None)


def test_a_method_of_a_users_own_is_one_file(shards: Path, tmp_path: Path, toy: tuple[str, ...]) -> None:
    run, more = tmp_path / "run", ("--method.options", "momentum=0.5", "--run.checkpoint_every", "1")
    assert pretrain(shards, run, *toy, *more) == 0
    lines = training_lines(run)
    assert [line["large"] for line in lines] == [1, 2] and all(line["loss"] == line["distance"] for line in lines)
    assert (run / "encoder" / "encoder.safetensors").exists()
    first, second = (load_file(run / "checkpoints" / f"step-00000000{n}" / "model.safetensors") for n in (1, 2))
    expected = (first["teacher.weight"] + second["predictor.weight"]) / 2
    torch.testing.assert_close(second["teacher.weight"], expected)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--method.options", "speed=1"), "method.options has 'speed': there are momentum"),
        (("--method.options", "momentum=fast"), "method.options has momentum = 'fast': give a value of type float"),
        (("--run.accumulation", "bitwise", "--model.norm", "frozen"), "method.name toy_method:Toy has plain"),
        (("--run.micro_batch_size", "16", "--model.norm", "frozen"), "or leave run.micro_batch_size out"),
    ],
)
def test_what_it_cannot_do_is_one_line(
    shards: Path, tmp_path: Path, toy: tuple[str, ...], capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], line: str,
) -> None:  # fmt: skip
    assert pretrain(shards, tmp_path / "run", *toy, *arguments) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and line in error[0], error
    assert not (tmp_path / "run").exists()


def test_a_file_of_settings_chooses_a_method_and_names_no_code(
    shards: Path, tmp_path: Path, toy: tuple[str, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job.yaml").write_text("method: {name: 'toy_method:Toy'}")
    (tmp_path / "method.yaml").write_text("name: 'toy_method:Toy'")
    for named in (("--config", str(tmp_path / "job.yaml")), ("--method", str(tmp_path / "method.yaml"))):
        assert pretrain(shards, tmp_path / "run", *named) == 2
        assert "method.name names code; do so on the command line" in capfd.readouterr().err
    assert "toy_method" not in sys.modules
