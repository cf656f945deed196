"""Schedule, optimizers, checkpoints and the loop, each against its definition."""

import itertools
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ca2cl.config import OptimConfig
from ca2cl.data.loading.stream import BadBudget, BadTile
from ca2cl.errors import InputError
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.runtime.signals import StopFlag
from ca2cl.training import loop
from ca2cl.training.checkpoint import Checkpointer, read_state, restore
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.loop import Progress, TrainJob, _failure, train
from ca2cl.training.optim import build_optimizer

LATE = pytest.mark.parametrize("late", [False, True])


def make_engine(name: Any = "adamw", seed: int = 0, *, fused: bool = False) -> AccelerateEngine:
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
    config = OptimConfig(name=name, lr=0.05)
    return AccelerateEngine(build_accelerator(), network, build_optimizer(config, network, fused=fused))


class Method(loop.Method):
    """A regression whose forward pass overflows in the steps of ``broken``."""

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.broken, self.step_number = broken, 0

    def step(self, engine: Any, micro_batches: Sequence[Tensor]) -> dict[str, Tensor]:
        (x,) = micro_batches
        if self.step_number in self.broken:
            x = x * float("inf")
        loss = (engine.network(x) - x.sum(1, keepdim=True)).square().mean()
        self.step_number += 1
        engine.backward(loss)
        return {"loss": loss.detach()}


@dataclass
class Data:
    micro_batches: list[Tensor]
    epoch: int = 0
    bad: list[BadTile] = field(default_factory=list)


@dataclass
class Recorder:
    lines: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)
    bad: list[tuple[int, str]] = field(default_factory=list)

    def log_step(self, record: dict[str, Any]) -> None:
        self.lines.append(record)

    def log_bad(self, step: int, tiles: Sequence[BadTile]) -> None:
        self.bad += [(step, tile.key) for tile in tiles]

    def after_epoch(self, epoch: int, engine: AccelerateEngine) -> None:
        self.epochs.append(epoch)


def batches(start: int = 0, bad: int = 0) -> Iterator[Data]:
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        yield Data(
            [torch.randn(16, 4, generator=generator)], epoch=step // 5, bad=[BadTile(f"tile{step}", "cut short")] * bad
        )
        step += 1


def make_job(
    folder: Path, steps: int, *, start: int = 0, bad: int = 0, method: Method | None = None, late: bool = False
) -> TrainJob:
    return TrainJob(
        engine=make_engine(), method=method or Method(), data=batches(start, bad), observer=Recorder(),
        checkpointer=Checkpointer(folder, 2), stop=StopFlag(), batch_size=16, rate=lambda step: 0.05,
        checkpoint_every=4, max_skipped=3, total_steps=steps, steps_per_epoch=5,
        check_bad=BadBudget(0.05).check, state={"run_id": "r"}, read_late=late,
    )  # fmt: skip


def weights(job: TrainJob) -> list[Tensor]:
    """Parameters, and BatchNorm's statistics."""
    return [value.detach().clone() for value in job.engine.bare.state_dict().values()]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars"])
def test_a_restored_checkpoint_goes_on_bit_for_bit(name: Any, tmp_path: Path) -> None:
    def steps(engine: AccelerateEngine, numbers: range) -> None:
        for number in numbers:
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
            engine.backward((engine.network(x) - x.sum(1, keepdim=True)).square().mean())
            engine.optimizer_step(0.05, None)

    whole, first, second = make_engine(name), make_engine(name), make_engine(name, seed=1)
    steps(whole, range(6))
    steps(first, range(3))
    Checkpointer(tmp_path, 1).save(3, first, {})
    newest = Checkpointer(tmp_path, 1).latest()
    assert newest is not None
    restore(newest, second)
    steps(second, range(3, 6))
    for a, b in zip(whole.bare.state_dict().values(), second.bare.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@LATE
def test_the_loop_trains_journals_and_keeps_the_newest_checkpoints(tmp_path: Path, late: bool) -> None:
    job, progress = make_job(tmp_path, 10, late=late), Progress()
    assert train(job, progress)
    assert isinstance(job.observer, Recorder)
    lines = job.observer.lines
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["samples"] for line in lines] == list(range(16, 161, 16))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert job.observer.epochs == [0, 1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000008", "step-000000010"]
    assert read_state(tmp_path / "step-000000010")["progress"]["step"] == 10


@LATE
def test_a_loss_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, late: bool) -> None:
    job, progress = make_job(tmp_path, 6, method=Method(broken=[2]), late=late), Progress()
    assert train(job, progress) and isinstance(job.observer, Recorder)
    assert progress.skipped_steps == 1
    assert [line["skipped_steps"] for line in job.observer.lines] == [0, 0, 1, 1, 1, 1]
    assert all(torch.isfinite(value).all() for value in weights(job))
    twin = make_job(tmp_path / "twin", 2)
    train(twin, Progress())
    stopped = make_job(tmp_path / "three", 3, method=Method(broken=[2]))
    train(stopped, Progress())
    assert all(torch.equal(a, b) for a, b in zip(weights(twin), weights(stopped), strict=True))


class Counting(Method):
    """Counts a thing in every second step, and what the loop tells it of steps that were done."""

    counters = ("things",)

    def __init__(self, broken: Sequence[int] = ()) -> None:
        super().__init__(broken)
        self.done: list[int] = []

    def step(self, engine: Any, micro_batches: Sequence[Tensor]) -> dict[str, Tensor]:
        return {**super().step(engine, micro_batches), "things": torch.tensor(self.step_number % 2)}

    def after_step(self, network: Any, step: int, total_steps: int) -> None:
        assert total_steps == 6 and isinstance(network, nn.Sequential)
        self.done.append(step)


def test_a_methods_counts_are_added_up_and_its_own_update_follows_each_step_that_was_done(tmp_path: Path) -> None:
    method = Counting(broken=[2])
    job, progress = make_job(tmp_path, 6, method=method), Progress()
    assert train(job, progress) and isinstance(job.observer, Recorder)
    assert [line["things"] for line in job.observer.lines] == [1, 1, 2, 2, 3, 3]
    assert method.done == [1, 2, 4, 5, 6]
    assert Progress.of(tmp_path / "step-000000006") == progress == Progress(6, 0, 1, {"things": 3})


def test_a_checkpoint_of_the_version_before_gives_the_same_counts(tmp_path: Path) -> None:
    held = {"step": 3, "bad_samples": 2, "skipped_steps": 1, "skipped_adversaries": 4}
    Checkpointer(tmp_path, 1).save(3, make_engine(), {"progress": held})
    progress = Progress.of(tmp_path / "step-000000003")
    assert progress.counts == {"skipped_adversaries": 4} and progress.state() == held


@LATE
def test_losses_that_stay_not_finite_end_the_run(tmp_path: Path, late: bool) -> None:
    with pytest.raises(InputError, match="3 steps in a row"):
        train(make_job(tmp_path, 10, method=Method(broken=range(4, 10)), late=late), Progress())


def test_numbers_read_late_are_read_after_the_next_step(tmp_path: Path) -> None:
    """And all of them before a checkpoint and at an epoch's end: every fourth and every fifth step."""
    seen: list[tuple[int, int]] = []

    class Watched(Method):
        def step(self, engine: Any, micro_batches: Sequence[Tensor]) -> dict[str, Tensor]:
            assert isinstance(job.observer, Recorder)
            seen.append((self.step_number, len(job.observer.lines)))
            return super().step(engine, micro_batches)

    job = make_job(tmp_path, 7, method=Watched(), late=True)
    assert train(job, Progress())
    assert seen == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 4), (5, 5), (6, 5)]
    assert [line["step"] for line in job.observer.lines] == list(range(1, 8))  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_fused_optimizer_skips_a_step_without_being_told_by_the_host(name: Any, broken: str) -> None:
    engine = make_engine(name, fused=True)
    for number in range(3):
        if number == 2:
            before = [value.clone() for value in engine.bare.state_dict().values()]
            moments = {key: dict(value) for key, value in engine.optimizer_state().items()}
            moments = {key: {k: v.gather().clone() for k, v in value.items()} for key, value in moments.items()}
        engine.keep_buffers()
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(number))
        loss = engine.network(x).square().mean()
        engine.backward(loss * (float("nan") if number == 2 and broken == "gradient" else 1.0))
        reported = loss.detach() * (float("nan") if number == 2 and broken == "loss" else 1.0)
        outcome = engine.optimizer_step(0.05, None, reported)
        assert bool(outcome.skipped) == (number == 2)
    assert all(torch.equal(a, b) for a, b in zip(before, engine.bare.state_dict().values(), strict=True))
    after = engine.optimizer_state()
    assert all(torch.equal(v, after[key][k].gather()) for key, value in moments.items() for k, v in value.items())


def test_the_loss_scale_stays_on_the_device() -> None:
    """A number would make the host wait in every micro-batch."""
    network = nn.Linear(2, 2)
    engine = AccelerateEngine(build_accelerator(), network, build_optimizer(OptimConfig(), network), "fp16")
    assert engine.scaler is not None and isinstance(engine.loss_scale, Tensor)
    assert float(engine.loss_scale) == engine.scaler.get_scale() > 1


def test_too_many_bad_tiles_end_the_run(tmp_path: Path) -> None:
    job = make_job(tmp_path, 500, bad=1)
    with pytest.raises(InputError, match="6 of 96.*tile5: cut short"):
        train(job, Progress())
    assert isinstance(job.observer, Recorder)
    assert job.observer.bad == [(step + 1, f"tile{step}") for step in range(6)]


def test_a_signal_writes_a_checkpoint_and_ends_the_loop(tmp_path: Path) -> None:
    progress = Progress()
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    try:
        job = replace(make_job(tmp_path, 10), stop=StopFlag().install())
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not train(job, progress)
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])
        signal.set_wakeup_fd(-1)
    assert progress.step == 1 and (tmp_path / "step-000000001").is_dir()


def test_a_run_that_went_back_keeps_its_own_checkpoints(tmp_path: Path) -> None:
    keeper, engine = Checkpointer(tmp_path, 1), make_engine()
    for step in (4, 9, 6):
        keeper.save(step, engine, {})
    newest = keeper.latest()
    assert newest is not None and newest.name == "step-000000006"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000006"]


def test_another_optimizers_checkpoint_is_refused(tmp_path: Path) -> None:
    keeper = Checkpointer(tmp_path, 1)
    keeper.save(1, make_engine("sgd"), {})
    with pytest.raises(InputError, match="holds the state of sgd, not of adamw; set optim.name"):
        restore(tmp_path / "step-000000001", make_engine("adamw"))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    keeper, engine = Checkpointer(tmp_path, 2), make_engine()
    keeper.save(1, engine, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        with pytest.raises(InputError, match="step 2 .*free some room"):
            keeper.save(2, engine, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    newest = keeper.latest()
    assert newest is not None and newest.name == "step-000000001"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-000000001"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_one_line(file: str, tmp_path: Path) -> None:
    keeper, engine = Checkpointer(tmp_path, 2), make_engine()
    engine.backward(engine.network(torch.ones(2, 4)).sum())
    engine.optimizer_step(0.05, None)
    keeper.save(1, engine, {})
    path = tmp_path / "step-000000001"
    (path / file).write_bytes((path / file).read_bytes()[:40])
    with pytest.raises(InputError, match="step-000000001"):
        restore(path, engine)


def test_a_checkpoint_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    keeper, engine = Checkpointer(tmp_path, 2), make_engine()
    keeper.save(1, engine, {})
    state = tmp_path / "step-000000001" / "state.json"
    state.write_text(state.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(InputError, match="newer"):
        restore(state.parent, engine)


def test_a_signal_after_a_checkpoint_does_not_write_it_again(tmp_path: Path) -> None:
    class Stopped(Method):
        def step(self, engine: Any, micro_batches: Sequence[Tensor]) -> dict[str, Tensor]:
            terms = super().step(engine, micro_batches)
            job.stop.raised = self.step_number == 4
            return terms

    job, progress = make_job(tmp_path, 10, method=Stopped()), Progress()
    assert not train(job, progress) and progress.step == 4
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-000000004"]


class Halves(Method):
    """Two micro-batches a step; Ctrl-C, or a scheduler's signal, during the first one of step ``at``."""

    def __init__(self, at: int, *, ctrl_c: bool) -> None:
        super().__init__()
        self.at, self.ctrl_c, self.seen = at, ctrl_c, 0
        self.job: TrainJob | None = None

    def step(self, engine: Any, micro_batches: Sequence[Tensor]) -> dict[str, Tensor]:
        loss = torch.zeros(())
        for x in micro_batches:
            engine.backward(part := (engine.network(x) - x.sum(1, keepdim=True)).square().mean() / 2)
            loss, self.seen = loss + part.detach(), self.seen + 1
            if self.step_number == self.at:
                assert self.job is not None
                self.job.stop.raised, self.job.stop.interrupted = True, self.ctrl_c
        self.step_number += 1
        return {"loss": loss}


def halves(folder: Path, steps: int, at: int, *, ctrl_c: bool = False) -> tuple[TrainJob, Halves]:
    method = Halves(at, ctrl_c=ctrl_c)
    data = (replace(one, micro_batches=list(one.micro_batches[0].split(8))) for one in batches())
    method.job = replace(make_job(folder, steps, method=method), data=data)
    return method.job, method


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_step_of_many_micro_batches_is_left_between_them(tmp_path: Path, ctrl_c: bool) -> None:
    """What is kept is the whole step before: weights, statistics, and what comes next."""
    (job, method), progress = halves(tmp_path / "left", 4, at=2, ctrl_c=ctrl_c), Progress()
    assert not train(job, progress) and progress.step == 2 and method.seen == 5
    assert job.stop.exit_code == (130 if ctrl_c else 85)
    whole, _ = halves(tmp_path / "whole", 2, at=-1)
    assert train(whole, Progress())
    assert all(torch.equal(a, b) for a, b in zip(weights(job), weights(whole), strict=True))
    assert read_state(tmp_path / "left" / "step-000000002")["progress"]["step"] == 2


def test_a_first_step_is_left_for_a_person_and_not_for_a_scheduler(tmp_path: Path) -> None:
    """A job that is preempted early each time would never end."""
    (job, _), progress = halves(tmp_path / "scheduler", 4, at=0), Progress()
    assert not train(job, progress) and progress.step == 1
    (job, _), progress = halves(tmp_path / "person", 4, at=0, ctrl_c=True), Progress()
    assert not train(job, progress) and progress.step == 0 and not list((tmp_path / "person").glob("step-*"))


def test_a_signal_ends_the_wait_for_data(tmp_path: Path) -> None:
    def data() -> Iterator[Data]:
        yield from itertools.islice(batches(), 3)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # a store that does not answer

    job, progress = replace(make_job(tmp_path, 10), data=data(), stop=StopFlag().install()), Progress()
    began = time.monotonic()
    assert not train(job, progress) and progress.step == 3 and time.monotonic() - began < 30
    assert (tmp_path / "step-000000003").is_dir() and job.stop.exit_code == 130


@pytest.mark.parametrize("fault", [InputError("shard-3.tar: gone"), RuntimeError("a worker was killed")])
def test_data_that_cannot_be_read_end_the_loop_as_what_they_are(tmp_path: Path, fault: Exception) -> None:
    def data() -> Iterator[Data]:
        yield next(batches())
        raise fault

    job, progress = replace(make_job(tmp_path, 10), data=data()), Progress()
    with pytest.raises(type(fault), match=str(fault)):
        train(job, progress)
    assert progress.step == 1


@pytest.mark.parametrize("fault", [InputError("shard-3.tar: gone"), RuntimeError("a worker was killed")])
def test_a_fault_of_another_rank_is_of_the_same_kind_here(tmp_path: Path, fault: Exception) -> None:
    """Exit code 2 means that the input is to be mended, and no scheduler starts such a job again."""
    job = make_job(tmp_path, 10)
    job.engine.gather_list = lambda mine: [*mine, (1, str(fault), isinstance(fault, InputError))]  # type: ignore[method-assign]
    told = _failure(job, None)
    assert type(told) is type(fault) and str(told) == f"rank 1: {fault}"
