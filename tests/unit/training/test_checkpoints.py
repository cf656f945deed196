"""Checkpoints that are damaged, killed while they are written, kept for good, or named by nothing."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ca2cl.config import OptimConfig
from ca2cl.errors import InputError
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer, DamagedCheckpoint, read_state, verify
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer


def make_engine() -> AccelerateEngine:
    network = nn.Linear(4, 3)
    engine = AccelerateEngine(
        build_accelerator(), network, build_optimizer(OptimConfig(name="adamw", lr=0.1), network), "no"
    )
    engine.backward(engine.network(torch.ones(2, 4)).sum())
    engine.optimizer_step(0.05, None)
    return engine


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.fixture
def keeper(tmp_path: Path) -> Checkpointer:
    keeper, engine = Checkpointer(tmp_path, 2), make_engine()
    for step in (5, 10):
        keeper.save(step, engine, {"progress": {"step": step}, "loss": float("nan"), "ratio": 1e-300})
    return keeper


def flip(path: Path, place: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def other_step(path: Path) -> None:
    """Valid JSON that says something else."""
    path.write_text(path.read_text().replace('"step": 10', '"step": 11', 1))


def older(path: Path) -> None:
    """A file of the checkpoint before."""
    shutil.copy(path.parents[1] / "step-000000005" / path.name, path)


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [
    ("model.safetensors", flip),
    ("model.safetensors", cut),
    ("model.safetensors", Path.unlink),
    ("optimizer.safetensors", flip),
    ("state.json", other_step),
    ("state.json", older),
    ("state.json", cut),
    ("state.json", Path.unlink),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(
    keeper: Checkpointer, file: str, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = keeper.latest()
    assert newest is not None and newest.name == "step-000000010"
    damage(newest / file)
    with pytest.raises(DamagedCheckpoint, match="step-000000010"):
        verify(newest)
    with caplog.at_level(logging.WARNING):
        before = keeper.latest()
    assert before is not None and before.name == "step-000000005" and read_state(before)["progress"]["step"] == 5
    assert "step-000000010: " in caplog.text and "going back to the one before" in caplog.text
    assert keeper.newest() == newest
    flip(before / "model.safetensors")
    with pytest.raises(InputError, match="every checkpoint is damaged; .* or remove the folder"):
        keeper.latest()
    keeper.save(10, make_engine(), {})  # a run that came here again
    assert keeper.latest() == newest and steps(keeper.folder) == [10]


def test_a_damaged_checkpoint_takes_no_whole_ones_place(keeper: Checkpointer) -> None:
    """Else the next damage would leave none: the whole one that a run went back to was pruned first."""
    flip(keeper.folder / "step-000000010" / "model.safetensors")
    keeper.latest()
    keeper.save(12, make_engine(), {})
    assert steps(keeper.folder) == [5, 12]
    flip(keeper.folder / "step-000000012" / "model.safetensors")
    before = keeper.latest()
    assert before is not None and before.name == "step-000000005"


def test_what_latest_says_need_not_be_there(keeper: Checkpointer) -> None:
    shutil.rmtree(keeper.folder / "step-000000010")
    found = keeper.latest()
    assert found is not None and found.name == "step-000000005"
    (keeper.folder / "latest").unlink()  # killed between its first checkpoint and the name
    found = keeper.latest()
    assert found is not None and found.name == "step-000000005"


def test_a_newer_version_is_no_damage(keeper: Checkpointer) -> None:
    state = keeper.folder / "step-000000010" / "state.json"
    state.write_text(state.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(InputError, match="schema 99 is newer"):
        keeper.latest()


def test_a_checkpoint_of_an_older_version_has_no_digests(keeper: Checkpointer) -> None:
    path = keeper.folder / "step-000000010" / "state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    path.write_text(json.dumps(state))
    assert keeper.latest() == path.parent


def test_every_so_many_stay_for_good(tmp_path: Path) -> None:
    keeper, engine = Checkpointer(tmp_path, 1, keep_every=20), make_engine()
    for step in (10, 20, 25, 30, 40, 45):
        keeper.save(step, engine, {})
    assert steps(tmp_path) == [20, 40, 45]
    keeper.save(30, engine, {})  # a run that went back: what came after is another run's
    assert steps(tmp_path) == [20, 30]
