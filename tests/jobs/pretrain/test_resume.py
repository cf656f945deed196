"""A finished run stays as it is, and a run goes on with the settings that it was begun with."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ca2cl.cli import main
from ca2cl.cli.parser import parse
from ca2cl.config import flatten
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig
from ca2cl.pretrain.numerics import fix_numerics
from ca2cl.pretrain.resume import FREE, is_finished
from ca2cl.training import checkpoint
from ca2cl.views.batch import VERSION
from tests.support.jobs import make_shards

JOB = (
    "--recipe", "smoke", "--data.workers", "0", "--data.image_size", "32", "--run.figures_every", "0",
    "--tracking.register_as", "null", "--data.shards", "shards-0", "--run.output_dir", "run", "--run.steps", "2",
)  # fmt: skip
Snapshot = dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, other shards, and a finished run of 2 steps under a cosine schedule."""
    home = tmp_path_factory.mktemp("home")
    make_shards(home, 8)
    make_shards(home, 8, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        assert main(["pretrain", *JOB]) == 0
    return home


@pytest.fixture
def run(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The finished run, which no test may change: neither its files nor what MLflow has of it."""
    monkeypatch.chdir(home)
    own = json.loads((home / "run" / "run.json").read_text())["run_id"]
    folders = (home / "run", home / "ca2cl-runs" / "artifacts" / own)
    before = snapshot(*folders)
    assert any("artifacts" in path for path in before)
    yield home / "run"
    assert snapshot(*folders) == before


def snapshot(*folders: Path) -> Snapshot:
    """Bytes and time of every file."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def look(*more: str, start: str = "") -> bool:
    """What a start of the job with these settings after its own finds."""
    config: Any = parse("pretrain", [*JOB, *more])
    mean, std = config.model.normalisation  # filled in by a job before it looks
    config = replace(config, model=replace(config.model, mean=mean, std=std))
    manifest = ShardIndex(Path(config.data.shards)).manifest
    origin = {"start_weights": start, "teacher": None}
    return is_finished(config, config.run.steps or config.run.epochs * 2, 2, manifest.digest, origin)


def test_a_finished_run_again_changes_nothing(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert main(["pretrain", *JOB]) == 0
    assert caplog.messages[-1] == "run: finished (2 of 2 steps), nothing to do"


def test_a_cut_state_of_the_newest_checkpoint_is_no_end(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk or a power cut may cut ``state.json``: the job goes on with the checkpoint before."""
    monkeypatch.chdir(shutil.copytree(run.parent, tmp_path / "home", symlinks=True))
    folder = Path("run/checkpoints")
    older = folder / "step-000000001"
    shutil.copytree(folder / "step-000000002", older)
    state = json.loads((older / "state.json").read_text())
    content = {**state, "step": 1, "progress": {**state["progress"], "step": 1}}
    digest = checkpoint._state_digest(content)
    (older / "state.json").write_text(json.dumps({**content, "sha256": {**content["sha256"], "state.json": digest}}))
    newest = folder / "step-000000002" / "state.json"
    newest.write_bytes(newest.read_bytes()[:100])
    assert main(["pretrain", *JOB, "--run.steps", "3"]) == 0
    assert "going back to the one before" in caplog.text
    assert (folder / "latest").read_text().strip() == "step-000000003"


def test_nor_do_other_settings_which_are_refused(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["pretrain", *JOB, "--run.seed", "3"]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == (
        "ca2cl: error: run.output_dir is 'run': it holds a finished run of 2 steps with other settings (run.seed 0 -> "
        "3); use those, or another run.output_dir, where --run.resume run/checkpoints/step-000000002 goes on from its "
        "weights"
    )


def test_places_and_ways_of_working_are_no_other_settings(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.parent / "shards-0", tmp_path / "copy")
    assert look("--data.workers", "3", "--run.checkpoint_every", "7", "--run.keep_last", "5")
    assert look("--run.steps", "null", "--run.epochs", "1")  # as many steps
    monkeypatch.chdir(tmp_path)
    assert look("--data.shards", "copy", "--run.output_dir", str(run), "--tracking.root", "elsewhere")


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--optim.lr", "0.5", "--views.strength", "0.5"), "(views.strength 1.0 -> 0.5, optim.lr "),
        (("--model.norm", "frozen"), "-> frozen"),
        (("--recipe", "crc5_small"), " more)"),
        (("--data.shards", "shards-1"), "(the tiles in data.shards, manifest "),
        (("--model.weights", "other.safetensors"), "model.weights random -> other.safetensors"),
        (("--run.micro_batch_size", "16", "--run.accumulation", "plain"), "run.micro_batch_size None -> 16"),
    ],
)
def test_every_other_setting_is_refused_by_name(run: Path, more: tuple[str, ...], named: str) -> None:
    own = ("--data.shards", "shards-0", "--run.output_dir", "run", "--run.steps", "2") if "--recipe" in more else ()
    with pytest.raises(InputError) as refused:
        look(*more, *own)
    assert "holds a finished run of 2 steps with other settings (" in str(refused.value)
    assert named in str(refused.value)


def test_a_run_may_be_made_longer_with_a_line_where_its_rates_depend_on_that(
    run: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    assert not look("--run.steps", "4")
    assert caplog.messages == [
        "run: 4 steps instead of 2; optim.schedule cosine_step goes to the new last step, and the 2 steps done had the "
        "old rates"
    ]
    assert main(["pretrain", *JOB, "--run.steps", "1"]) == 2
    assert "newest checkpoint is of step 2" in capfd.readouterr().err


def test_a_run_that_goes_on_keeps_its_recipe_and_data(run: Path, tmp_path: Path) -> None:
    """One that was stopped before its end, and one that was begun with a schedule that has no end."""
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    journal, record = begun / "journal.jsonl", json.loads((begun / "run.json").read_text())
    journal.write_text(journal.read_text().replace('"FINISHED"', '"KILLED"'))
    where = ("--run.output_dir", str(begun))
    assert not look(*where)  # nothing against going on
    for more, named in (
        (("--objective.epsilon", "2.0"), "epsilon .* -> 2.0"),
        (("--data.shards", "shards-1"), "tiles"),
    ):
        with pytest.raises(InputError, match=f"it holds a run with other settings .*{named}"):
            look(*where, *more)
    record["params"] |= {"optim.schedule": "constant", "model.weights": "a.safetensors"}
    (begun / "run.json").write_text(json.dumps(record))
    digest = json.loads((begun / "checkpoints" / "step-000000002" / "state.json").read_text())["start_weights"]
    more = (*where, "--optim.schedule", "constant", "--run.steps", "9", "--model.weights", "../x/a.safetensors")
    assert not look(*more, start=digest)
    with pytest.raises(InputError, match=r"model.weights a.safetensors -> ../x/a.safetensors"):
        look(*more, start="other weights")


def test_the_way_on_that_a_refusal_names_works(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Longer, with another rate, in a folder of its own: a new run that says where it comes from."""
    longer = tmp_path / "longer"
    more = ("--run.resume", "run/checkpoints/step-000000002", "--optim.lr", "0.001", "--run.steps", "3")
    where = ("--run.output_dir", str(longer))
    assert main(["pretrain", *JOB, *more, *where]) == 0, capfd.readouterr().err
    lines = [json.loads(line) for line in (longer / "journal.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "step" in line] == [3]
    record, first = (json.loads((folder / "run.json").read_text()) for folder in (longer, run))
    assert record["run_id"] != first["run_id"] and record["params"]["optim.lr"] == "0.001"
    tags = {name: value for line in lines for name, value in line.get("tags", {}).items()}
    assert tags["ca2cl.begun_from"] == f"{first['run_id']} step 2"
    assert look(*more, *where)


def test_what_may_change_are_settings() -> None:
    assert set(FREE) <= flatten(PretrainConfig()).keys()


def older_views(run: Path, folder: Path, **state: Any) -> Path:
    """The run's checkpoint as of a time when views were of version 1, which states do not name or name so."""
    checkpoint = folder / "step-000000002"
    shutil.copytree(run / "checkpoints" / "step-000000002", checkpoint)
    file = checkpoint / "state.json"
    content = json.loads(file.read_text())
    del content["views"], content["sha256"]
    file.write_text(json.dumps(content | state))
    return checkpoint


def test_a_run_in_older_views_goes_on_with_a_line(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = older_views(run, tmp_path, views=1)
    where = ("--run.resume", str(checkpoint), "--run.output_dir", str(tmp_path / "on"), "--run.steps", "3")
    assert main(["pretrain", *JOB, *where]) == 0
    assert f"{checkpoint}: was trained on views of version 1; it continues with version {VERSION}" in caplog.text
    state = json.loads((tmp_path / "on" / "checkpoints" / "step-000000003" / "state.json").read_text())
    assert state["views"] == VERSION


def test_bitwise_refuses_older_views(run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bitwise = ("--run.accumulation", "bitwise", "--model.norm_group", "8")
    checkpoint = older_views(run, tmp_path, numerics=fix_numerics(torch.device("cpu")))
    where = ("--run.resume", str(checkpoint), "--run.output_dir", str(tmp_path / "on"), "--run.steps", "3")
    assert main(["pretrain", *JOB, *where, *bitwise]) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"views is '{VERSION}' here and 'not set' in {checkpoint}" in line and "--run.accumulation exact" in line
    assert not (tmp_path / "on" / "journal.jsonl").exists()
