"""Fine-tuning: what is held out, the order of tiles, one process against two, a kill in the middle, bad input."""

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from tqdm import tqdm

from ca2cl.common.job_dir import JobDir
from ca2cl.config import OptimConfig
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.finetune.config import FinetuneConfig
from ca2cl.evaluation.finetune.early_stopping import Best, Looks, Selection
from ca2cl.evaluation.finetune.run import _changes, _starts
from ca2cl.evaluation.finetune.step import Preprocessing
from ca2cl.evaluation.finetune.trial import Trial, preprocessing_of
from ca2cl.evaluation.labelled import IGNORED, LabelledOrder, hold_out, labelled_steps
from ca2cl.models.encoder_io import save_encoder
from ca2cl.registry.resolve import resolve_encoder
from ca2cl.runtime.accelerator import build_accelerator
from ca2cl.training.checkpoint import Checkpointer
from ca2cl.training.engine import AccelerateEngine
from ca2cl.training.optim import build_optimizer
from ca2cl.training.schedule import learning_rate
from tests.support.forked import CODE, Forked, ca2cl
from tests.support.jobs import make_shards
from tests.support.shards import encode, random_tiles, write_shards

SMALL = (
    "--encoder", "random:3", "--labels", "4", "--seeds", "1", "--epochs", "4", "--min_steps", "1", "--batch_size", "16",
    "--image_size", "32", "--workers", "0", "--norm", "frozen", "--optim.lr", "0.05",
)  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("labelled")
    return str(make_shards(folder, 8, seed=0)), str(make_shards(folder, 3, seed=1))


def finetune(folder: Path, pair: tuple[str, str], *more: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return ca2cl(folder, *verb(pair, *more), processes=processes)


def verb(pair: tuple[str, str], *more: str) -> tuple[str, ...]:
    return ("finetune", "--train", pair[0], "--test", pair[1], "--output_dir", "job", *SMALL, *more)


def probabilities(folder: Path) -> Any:
    return load_file(folder / "job" / "cells" / "encoder-4-per-class-seed0" / "predictions.safetensors")[
        "probabilities"
    ]


def test_a_cosine_starts_again_every_few_epochs() -> None:
    config = OptimConfig(lr=2.0, schedule="cosine_restarts", restart_epochs=4)
    rates = [learning_rate(config, step, 24, 3) for step in range(24)]
    quarter = [1 + np.cos(np.pi * part / 4) for part in range(4)]
    assert rates == pytest.approx(np.repeat(quarter * 2, 3))


def test_whole_slides_are_held_out_where_they_are_known() -> None:
    labels = np.arange(120) % 3
    groups = [f"slide {n // 6}" for n in range(120)]
    held, how = hold_out(labels, groups, 0.2, seed=1)
    assert how == "whole slides or patients" and 12 <= held.sum() <= 36
    assert {groups[n] for n in np.flatnonzero(held)}.isdisjoint(groups[n] for n in np.flatnonzero(~held))
    held, how = hold_out(labels, [*groups[:-1], None], 0.2, seed=1)
    assert how == "whole slides or patients", "one tile without a slide is a slide of its own"
    assert {groups[n] for n in np.flatnonzero(held[:-1])}.isdisjoint(groups[n] for n in np.flatnonzero(~held[:-1]))
    held, how = hold_out(labels, [None] * 120, 0.2, seed=1)
    assert how == "tiles of any slide" and np.bincount(labels[held]).tolist() == [8, 8, 8]


@pytest.mark.parametrize("seed", range(8))
def test_slides_are_held_out_only_where_both_sides_hold_every_class(seed: int) -> None:
    labels = np.repeat(np.arange(9), 200)  # two slides a class, each of one class: no fold of slides holds all nine
    held, how = hold_out(labels, [f"s{n // 100}" for n in range(1800)], 0.2, seed)
    assert not held.any() and how == "none: no whole slides hold every class and leave some of it"
    mixed = [f"s{n % 7}" for n in range(1800)]
    held, how = hold_out(labels, mixed, 0.2, seed)
    assert how == "whole slides or patients" and set(labels[held]) == set(labels[~held]) == set(range(9))
    held, how = hold_out(labels, ["one"] * 1800, 0.2, seed)
    assert not held.any() and how == "none: there is one slide"


def test_fewer_tiles_than_can_choose_are_not_held_out() -> None:
    held, how = hold_out(np.arange(50) % 5, None, 0.2, seed=0)
    assert not held.any() and how == "none: fewer than 15 tiles would be"


def test_an_encoders_path_does_not_lead_out_of_the_jobs_folder() -> None:
    starts = ["/models/enc.safetensors", "../enc", "a/b", "a-b", "models:/x@y", "encoder", "random"]
    folders = [Trial(start, 0.01, 0).name for start in starts]
    assert not [name for name in folders if "/" in name or name.startswith(".")]
    assert len(set(folders)) == len(starts) and folders[-2:] == ["encoder-1pct-seed0", "random-1pct-seed0"]


def test_nothing_is_held_out_where_a_class_has_too_few() -> None:
    held, how = hold_out(np.array([0, 0, 0, 0, 1, 1, 1, 1, 1]), [None] * 9, 0.2, seed=0)
    assert not held.any() and "fewer than 5" in how


@given(count=st.integers(1, 60), batch=st.integers(1, 70), seed=st.integers(0, 1000))
def test_an_epoch_shows_no_tile_twice_and_another_epoch_another_order(count: int, batch: int, seed: int) -> None:
    order = LabelledOrder(np.arange(100, 100 + count), batch, seed)
    assert order.size == min(batch, count) and order.steps_per_epoch == count // order.size
    epochs = [
        order.samples_N[np.concatenate([*order.batches(range(first, first + order.steps_per_epoch))])]
        for first in range(0, 3 * order.steps_per_epoch, order.steps_per_epoch)
    ]
    for seen in epochs:
        assert len(set(seen.tolist())) == len(seen) == order.steps_per_epoch * order.size
        assert set(seen.tolist()) <= set(range(100, 100 + count))
    if count > 20:
        assert any(a.tolist() != b.tolist() for a, b in zip(epochs, epochs[1:], strict=False))


@pytest.mark.parametrize(("world", "micro"), [(1, None), (2, None), (3, 2), (4, 3)])
def test_ranks_share_a_batch_and_a_tile_that_does_not_decode_is_ignored(
    tmp_path: Path, world: int, micro: int | None
) -> None:
    pixels = random_tiles(11)
    data = [encode(tile) for tile in pixels]
    data[4] = data[4][:40]
    root = write_shards(tmp_path / "shards", data, labels=[n % 3 for n in range(11)], classes=["a", "b", "c"])
    index, reader = ShardIndex(root), ShardReader(str(root))
    order = LabelledOrder(np.arange(11), 11, seed=0)
    seen: list[tuple[bytes, int]] = []
    bad: list[str] = []
    counts = set()
    for rank in range(world):
        (step,) = labelled_steps(
            index, reader, order, rank=rank, world=world, micro_batch_size=micro, workers=0,
            device=torch.device("cpu"), steps=range(1),
        )  # fmt: skip
        bad += [tile.key for tile in step.bad]
        counts.add(len(step.micro_batches))
        for batch in step.micro_batches:
            assert batch.total == 11 and 1 <= len(batch.labels) <= (micro or 11)
            seen += [
                (t.numpy().tobytes(), int(y)) for t, y in zip(batch.tiles, batch.labels, strict=True) if y != IGNORED
            ]
    assert len(counts) == 1 and len(bad) == 1
    assert sorted(seen) == sorted((tile.tobytes(), n % 3) for n, tile in enumerate(pixels) if n != 4)


@pytest.fixture(scope="module")
def whole(pair: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    done = finetune(folder, pair, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    assert "encoder less random, 4/class labels:" not in done.stdout and "logged as MLflow run" in done.stdout
    said = json.loads((folder / "job" / "finetune-results.json").read_text())["verdict"]["sentence"]
    assert "top-1 accuracy on shards-1: 27 tiles, mean of 2 draws of labels; chance 0.111" in done.stdout
    assert f" {said} " in " ".join(done.stdout.split())
    details = (folder / "job" / "finetune-results-details.txt").read_text()
    assert "encoder less random, 4/class labels:" in details and "recall by class" in details
    return folder


def test_a_job_leaves_its_table_and_both_its_starts_tile_by_tile(whole: Path) -> None:
    content = json.loads((whole / "job" / "finetune-results.json").read_text())
    assert [(row["features"], row["labelled"], len(row["seeds"])) for row in content["results"]] == [
        ("encoder", 36, 2), ("random", 36, 2),
    ]  # fmt: skip
    (difference,) = content["differences"]
    means = {row["features"]: row["mean"]["accuracy"] for row in content["results"]}
    assert difference["mean"] == pytest.approx(means["encoder"] - means["random"])
    assert {cell["steps"] for cell in content["cells"]} == {8}
    assert (whole / "job" / "confusion.png").exists()


@pytest.mark.parametrize("more", [(), ("--micro_batch_size", "4")])
def test_two_processes_are_one(whole: Path, pair: tuple[str, str], tmp_path: Path, more: tuple[str, ...]) -> None:
    done = finetune(tmp_path, pair, "--against", "[]", *more, processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(probabilities(tmp_path), probabilities(whole), atol=1e-4)


def lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else iter(())


def test_a_job_that_is_signalled_goes_on_to_the_same_end(pair: tuple[str, str], tmp_path: Path) -> None:
    """With held-out tiles and an early end, within a cell and between cells."""
    options = ("--labels", "1.0", "--epochs", "20", "--patience", "2", "--norm", "sync", "--against", "[]")
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    done = finetune(folders[0], pair, *options)
    assert done.returncode == 0, done.stderr
    job = Forked(folders[1], *verb(pair, *options))
    journal = folders[1] / "job" / "cells" / "encoder-100pct-seed0" / "journal.jsonl"
    until = time.monotonic() + 200
    while sum("step" in line for line in lines(journal)) < 6 and time.monotonic() < until and job.poll() is None:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=200)
    assert job.returncode == 85, error
    again = finetune(folders[1], pair, *options)
    assert again.returncode == 0, again.stderr
    results = [json.loads((f / "job" / "finetune-results.json").read_text()) for f in folders]
    assert results[0]["results"] == results[1]["results"] and results[0]["cells"] == results[1]["cells"]
    (cell,) = results[0]["cells"]
    assert cell["held_out"] > 0 and cell["best_epoch"] >= 0
    looks = [line for line in lines(journal) if line.get("event") == "held_out"]
    assert min(looks, key=lambda look: look["loss"])["epoch"] == cell["best_epoch"]


def test_a_random_start_sees_tiles_at_the_encoders_size(tmp_path: Path) -> None:
    random = resolve_encoder("random")
    save_encoder(tmp_path / "trained", random.encoder.state_dict(), replace(random.card, input_size=48))
    config = FinetuneConfig(encoder=str(tmp_path / "trained"), train="", test="", output_dir="")
    sizes = {name: preprocessing_of(config, found).size for name, found in _starts(config).items()}
    assert sizes == {"encoder": 48, "random": 48}


def test_the_best_weights_of_the_newest_checkpoint_stay(tmp_path: Path) -> None:
    """A job that is killed long after a checkpoint goes on from there, and needs the weights that were best then."""
    network = torch.nn.Linear(2, 2)
    engine = AccelerateEngine(build_accelerator(), network, build_optimizer(OptimConfig(), network))
    checkpointer = Checkpointer(tmp_path / "checkpoints", keep_last=1)
    prepare, bar = Preprocessing(32, (0.5,) * 3, (0.5,) * 3), tqdm(disable=True)
    selection = Selection(tmp_path, None, prepare, Looks(1, 5, 2, 0), {}, 0, checkpointer, bar)
    for epoch in range(5):
        selection.best = Best(loss=1 / (epoch + 1), epoch=epoch)
        selection._keep_weights(engine)
        if epoch == 1:
            checkpointer.save(2, engine, {"best": asdict(selection.best)})
    selection.close()
    there = sorted(path.name for path in tmp_path.glob("best-epoch-*"))
    assert there == ["best-epoch-000001.safetensors", "best-epoch-000004.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--labels", "0"), "labels is 0"),
        (("--held_out", "0.9"), "held_out is 0.9"),
        (("--optim.name", "lars"), "optim.name is 'lars'"),
        (("--against", "random", "random"), "against names one encoder twice"),
        (("--train", "nowhere"), "nowhere/manifest.json: no manifest here"),
        (("--encoder", "random:x"), "the seed is no number"),
        (("--output_dir", "used"), "is not empty and holds no such job"),
        (("--sedes", "3"), "did you mean seeds?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    pair: tuple[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], message: str,
) -> None:  # fmt: skip
    from ca2cl.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    code = main(["finetune", "--train", pair[0], "--test", pair[1], "--output_dir", "job", *SMALL, *arguments])
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("ca2cl: error: ")]
    assert code == 2 and len(error) == 1 and message in error[0], error
    assert not (tmp_path / "job").exists()


def test_test_tiles_that_are_training_tiles_are_flagged(pair: tuple[str, str], tmp_path: Path) -> None:
    done = finetune(tmp_path, (pair[0], pair[0]), "--against", "[]", "--epochs", "1")
    assert done.returncode == 0 and "LEAK: 72 of 72 test tiles are training tiles too" in done.stderr, done.stderr
    assert json.loads((tmp_path / "job" / "finetune-results.json").read_text())["leak"]["equal_test_tiles"] == 72


def test_a_finished_job_again_changes_nothing(whole: Path, pair: tuple[str, str]) -> None:
    files = [path for path in (whole / "job").rglob("*") if path.is_file()]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    done = finetune(whole, pair, "--seeds", "2")
    assert done.returncode == 0 and "already" in done.stdout, done.stderr
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_weights_and_data_are_known_by_their_digests() -> None:
    held = {"settings": {"encoder": "champion", "train": "a", "epochs": 4}, "data": ["t"], "weights": ["w"]}
    moved = {"settings": {"encoder": "runs/one", "train": "../a", "epochs": 4}, "data": ["t"], "weights": ["w"]}
    assert _changes(held, moved) == []
    assert _changes(held, held | {"weights": ["v"]}) == ["encoder or against means other weights now"]  # an alias moved
    assert _changes(held, moved | {"weights": ["v"]}) == ["encoder champion -> runs/one"]
    assert _changes(held, held | {"data": ["u"]}) == ["the tiles in train or test"]
    assert _changes(held, held | {"settings": held["settings"] | {"epochs": 5}}) == ["epochs 4 -> 5"]  # type: ignore[operator]


def test_a_folder_of_another_job_is_refused(whole: Path, pair: tuple[str, str]) -> None:
    done = finetune(whole, pair, "--optim.lr", "0.5", "--seeds", "2")
    assert done.returncode == 2 and "holds another job (optim.lr " in done.stderr


def test_a_second_job_keeps_out_of_the_folder(whole: Path, pair: tuple[str, str]) -> None:
    code = (
        "import sys, ca2cl.common.job_dir as folder\nfolder.LOCK_S = 0.3\n"
        "from ca2cl.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    with JobDir(whole / "job").locked():
        second = Forked(whole, code, *verb(pair, "--seeds", "2"), module=CODE)
        assert second.wait(timeout=300) == 2
    assert "job: another job is writing here; wait for it, or end it" in second.stderr()
