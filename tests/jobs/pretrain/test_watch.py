"""A watched run: the weights of one that is not, the same numbers on any number of processes, and after a signal."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from ca2cl.cli import main
from ca2cl.config import TrackingConfig
from ca2cl.methods.registry import known_method
from ca2cl.models.encoder_card import read_card
from ca2cl.pretrain.watch.watch import Watch
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.report.curves import panels
from ca2cl.report.material import read_material
from ca2cl.store.open import open_store
from ca2cl.tracking.journal import watch_lines
from ca2cl.tracking.run_record import read_run
from ca2cl.training.engine import AccelerateEngine
from tests.support.forked import on_ranks
from tests.support.jobs import make_shards, pretrain, training_lines

STEPS = 8
JOB = (
    "--recipe", "smoke", "--run.steps", str(STEPS), "--run.checkpoint_every", "4", "--run.figures_every", "0",
    "--objective.adversary", "false", "--data.shards", "shards-0",
)  # fmt: skip
BITWISE = ("--run.accumulation", "bitwise", "--model.norm", "lane_group", "--model.norm_group", "2")
WITHOUT_LABELLED = ("--watch.shards", "shards-1", "--watch.every", "3", "--watch.tiles", "90")
WATCH = (*WITHOUT_LABELLED, "--watch.labelled", "shards-0")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards for training, and others."""
    home = tmp_path_factory.mktemp("watch")
    make_shards(home, 6)
    make_shards(home, 6, seed=1)
    return home


def digest(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / f"checkpoints/step-{STEPS:09d}/model.safetensors").read_bytes()).hexdigest()


def looks(run_dir: Path) -> list[dict[str, Any]]:
    """The watch lines without times."""
    return [
        {k: v for k, v in line.items() if not k.endswith(("time", "seconds"))}
        for line in watch_lines(run_dir / "journal.jsonl")
    ]


def run(home: Path, name: str, *more: str, processes: int = 1) -> Path:
    done = pretrain(home, *JOB, "--run.output_dir", name, *more, processes=processes)
    assert done.returncode == 0, done.stderr
    return home / name


@pytest.fixture(scope="module")
def watched(home: Path) -> Path:
    """A finished run on two processes."""
    return run(home, "two", *BITWISE, *WATCH, processes=2)


def test_weights_are_those_of_a_run_without_a_watch(home: Path, watched: Path) -> None:
    alone = run(home, "alone", *BITWISE, "--tracking.register_as", "null")
    assert digest(alone) == digest(watched)
    assert [line["loss"] for line in training_lines(alone)] == [line["loss"] for line in training_lines(watched)]
    assert looks(alone) == [] and [line["step"] for line in looks(watched)] == [3, 6, 8]


def signalled_at_step_6(_rank: int, folder: str) -> None:
    """A job that SIGTERM reaches as its watch after step 6 begins."""
    look = Watch.look

    def signalled(self: Watch, step: int, engine: AccelerateEngine) -> None:
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        look(self, step, engine)

    Watch.look = signalled  # type: ignore[method-assign]
    os.chdir(folder)
    job = (*JOB, *BITWISE, *WITHOUT_LABELLED, "--run.output_dir", "stopped", "--tracking.register_as", "null")
    assert main(["pretrain", *job]) == 85


def test_a_signal_during_a_watch_changes_neither_numbers_nor_the_best(home: Path, watched: Path) -> None:
    """On one process, and so also: the numbers do not depend on how many there are. And before the signal the shards
    that vote are not named: they are those of the training."""
    on_ranks(signalled_at_step_6, 1, str(home))
    again = run(home, "stopped", *BITWISE, *WATCH, "--tracking.register_as", "null")
    assert digest(again) == digest(watched)
    assert looks(again) == looks(watched)
    assert (again / "best/encoder.safetensors").read_bytes() == (watched / "best/encoder.safetensors").read_bytes()
    run_id, client = read_run(again).run_id, open_store(root=home / "ca2cl-runs").client
    for name in ("watch/knn", "watch/linear", "watch/rank", "watch/uniformity"):
        assert [point.step for point in client.get_metric_history(run_id, name)] == [3, 6, 8], name


def test_the_best_encoder_is_registered_beside_the_last(home: Path, watched: Path) -> None:
    found = looks(watched)
    values = [line["watch/linear"] for line in found]
    step = found[values.index(max(values))]["step"]
    assert read_card(watched / "best" / "card.json").step == step
    root = home / "ca2cl-runs"
    best, last = (resolve_encoder(f"models:/ca2cl-encoder@{alias}", root=root) for alias in ("best", "latest"))
    assert best.card.step == step and last.card.step == STEPS
    assert best.card.metrics["watch/linear"] == max(values) and last.card.metrics["watch/linear"] == values[-1]
    assert resolve_encoder(str(watched / "best")).digest() == best.digest()
    state = json.loads((watched / f"checkpoints/step-{STEPS:09d}/state.json").read_text())["watch"]
    assert state["best_step"] == step and state["collapsed"] == 0


def test_the_report_draws_it_from_the_journal_and_from_mlflow(home: Path, watched: Path) -> None:
    tracking = TrackingConfig(root=str(home / "ca2cl-runs"))
    here = read_material(str(watched), tracking)
    moved = watched.rename(home / "elsewhere")
    there = read_material(here.run_id, tracking)
    moved.rename(watched)
    assert there.folder is None
    for material in (here, there):
        assert [line["step"] for line in material.lines] == list(range(1, STEPS + 1))
        assert [line["step"] for line in material.watched] == [3, 6, 8]
        titles = [panel.title for panel in panels(material.lines, known_method("ca2cl"), material.watched)]
        assert {"Held-out accuracy", "Effective rank", "Uniformity", "Alignment"} <= set(titles)


def test_a_collapse_ends_the_run_with_a_reason(home: Path) -> None:
    """A learning rate at which weights overflow; ``run.max_skipped`` would take longer to see it."""
    flat = ("--optim.lr", "1e6", "--optim.warmup_steps", "0", "--run.max_skipped", "100", "--watch.every", "1")
    done = pretrain(home, *JOB, *WATCH, *flat, "--watch.stop", "true", "--run.output_dir", "flat")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert "watch.stop is true: the features have collapsed at 2 watches in a row, the last at step " in last, last
    assert "lower optim.lr" in last
    assert len([line for line in looks(home / "flat") if line.get("collapse")]) == 2
    run_ = open_store(root=home / "ca2cl-runs").client.get_run(read_run(home / "flat").run_id)
    assert run_.info.status == "FAILED" and "step" in run_.data.tags["ca2cl.collapse"]


def test_the_training_shards_are_no_held_out_ones(home: Path) -> None:
    done = pretrain(home, *JOB, "--watch.shards", "shards-0", "--run.output_dir", "leak")
    assert done.returncode == 2 and "these are the shards of data.shards" in done.stderr.splitlines()[-1]
    assert not (home / "leak").exists()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["cpu", "deepspeed_zero1", "deepspeed_zero2"])
def test_weights_under_engines_and_with_an_average(home: Path, config: str) -> None:
    if config.startswith("deepspeed"):
        pytest.importorskip("deepspeed")
    more = ("--optim.ema", "0.9", "--tracking.register_as", "null")
    made = []
    for name, watch in (("with", WATCH), ("without", ())):
        done = pretrain(home, *JOB, *more, *watch, "--run.output_dir", f"{config}-{name}", processes=2, config=config)
        assert done.returncode == 0, done.stderr
        made.append(home / f"{config}-{name}")
    assert digest(made[0]) == digest(made[1])
    ema = [one / f"checkpoints/step-{STEPS:09d}/ema.safetensors" for one in made]
    assert ema[0].read_bytes() == ema[1].read_bytes()
