"""The moving average of the weights against its definition, one number at a time."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ca2cl.errors import InputError
from ca2cl.training.checkpoint import Checkpointer, read_state, restore, verify
from ca2cl.training.ema import Ema
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.loop import Progress, train
from tests.unit.training.test_training import Method, make_engine, make_job

DECAY = 0.75


def walk(engine: AccelerateEngine, steps: range, broken: int = -1) -> list[dict[str, Tensor]]:
    """The weights and statistics after every step."""
    seen = []
    for step in steps:
        engine.keep_buffers()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step)) * (float("inf") if step == broken else 1)
        loss = (engine.network(x) - x.sum(1, keepdim=True)).square().mean()
        engine.backward(loss)
        engine.average(engine.optimizer_step(0.05, None, loss.detach(), step))
        seen.append({name: value.clone() for name, value in engine.bare.state_dict().items()})
    return seen


@pytest.mark.parametrize("fused", [False, True])
def test_the_average_is_its_definition_to_the_last_bit_and_skipped_steps_have_no_part(fused: bool) -> None:
    engine = make_engine("adam", fused=fused)
    engine.keep_average(DECAY)
    assert engine.ema is not None
    slow = {name: value.numpy().copy() for name, value in engine.bare.state_dict().items()}
    for step, weights in enumerate(walk(engine, range(6), broken=3)):
        for name, value in weights.items():
            if "tracked" in name:
                slow[name] = value.numpy()
            elif step != 3:
                change = (value.numpy() - slow[name]) * np.float32(1 - DECAY)
                slow[name] = slow[name] + change
    found = engine.ema.state()
    assert found.keys() == slow.keys() and int(found["1.num_batches_tracked"]) == 5
    assert all(np.array_equal(found[name].numpy(), value) for name, value in slow.items())
    assert not torch.equal(found["1.running_mean"], engine.bare[1].running_mean)


def test_where_weights_lie_in_memory_does_not_show() -> None:
    """DistributedDataParallel has kernels in channels_last order, ZeRO contiguous."""
    torch.manual_seed(0)
    start, moved = torch.randn(2, 7, 5, 3, 3)
    found = []
    for order in (torch.channels_last, torch.contiguous_format):
        network = nn.Conv2d(5, 7, 3, bias=False).to(memory_format=order)  # type: ignore[call-overload]
        network.weight.data.copy_(start)
        ema = Ema(lambda network=network: {"weight": network.weight.detach()}, 0.9)
        network.weight.data.copy_(moved)
        ema.update(torch.tensor(False))
        found.append(ema.state()["weight"])
    assert torch.equal(*found) and not torch.equal(found[0], start)


def test_a_resumed_average_is_the_same_to_the_last_bit(tmp_path: Path) -> None:
    whole, first, second = make_engine(), make_engine(), make_engine(seed=1)
    for engine in (whole, first, second):
        engine.keep_average(DECAY)
    walk(whole, range(6))
    walk(first, range(3))
    Checkpointer(tmp_path, 1).save(3, first, {})
    path = tmp_path / "step-000000003"
    assert "ema.safetensors" in read_state(path)["sha256"]
    restore(path, second)
    walk(second, range(3, 6))
    assert whole.ema is not None and second.ema is not None
    assert all(torch.equal(second.ema.state()[name], value) for name, value in whole.ema.state().items())
    file = path / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=r"ema.safetensors is not what was written"):
        verify(path)


def test_a_checkpoint_without_an_average_begins_one_with_its_weights(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before, after = make_engine(), make_engine(seed=1)
    walk(before, range(2))
    Checkpointer(tmp_path, 1).save(2, before, {})
    after.keep_average(DECAY)
    with caplog.at_level(logging.WARNING):
        restore(tmp_path / "step-000000002", after)
    assert "holds no moving average" in caplog.text
    assert after.ema is not None
    assert all(torch.equal(after.ema.state()[name], value) for name, value in before.bare.state_dict().items())


@pytest.mark.parametrize("late", [False, True])
def test_the_loop_averages_the_steps_that_were_done(tmp_path: Path, late: bool) -> None:
    job = make_job(tmp_path / "job", 5, method=Method(broken=[2]), late=late)
    job.engine.keep_average(DECAY)
    twin = make_engine()
    twin.keep_average(DECAY)
    assert train(job, Progress())
    walk(twin, range(5), broken=2)
    assert job.engine.ema is not None and twin.ema is not None
    assert all(torch.equal(job.engine.ema.state()[name], value) for name, value in twin.ema.state().items())


def test_the_average_is_in_place_for_a_while() -> None:
    engine = make_engine()
    engine.keep_average(DECAY)
    assert engine.ema is not None
    last = walk(engine, range(3))[-1]
    average = {name: value.clone() for name, value in engine.ema.state().items()}
    with engine.averaged():
        assert all(torch.equal(value, average[name]) for name, value in engine.bare.state_dict().items())
    assert all(torch.equal(value, last[name]) for name, value in engine.bare.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in engine.ema.state().items())


def test_what_is_not_trained_is_not_averaged() -> None:
    """A frozen teacher would only cost its memory once more."""
    engine = make_engine()
    engine.bare[3].requires_grad_(False)
    engine.keep_average(DECAY)
    assert engine.average_state().keys() == {name for name in engine.bare.state_dict() if not name.startswith("3.")}


def test_the_average_of_another_network_is_refused(tmp_path: Path) -> None:
    engine = make_engine()
    engine.keep_average(DECAY)
    walk(engine, range(1))
    Checkpointer(tmp_path, 1).save(1, engine, {})
    file = tmp_path / "step-000000001" / "ema.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "0.bias"}, file)
    with pytest.raises(InputError, match=r"does not fit this network \(another network's average: 0.bias\)"):
        restore(file.parent, engine)
