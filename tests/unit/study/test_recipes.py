"""A study's file: what it says becomes settings, and what is wrong with it is one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.cli.parser import find_study, recipes
from ca2cl.errors import InputError
from ca2cl.study.config import StudyConfig
from ca2cl.study.recipes import read_study

GOOD = """
shards: tiles
seeds: 2
minutes: 0.5
settings: {optim: {warmup_steps: 7}, run: {batch_size: 128}}
recipes:
  full: {recipe: crc5_small, objective: {adversary: true}}
  plain: {recipe: simclr, optim: {warmup_steps: 3}, views: {crop_scale: [0.3, 0.9]}}
probe: {test: [a, b], labels: [0.1, 1.0], seeds: 4}
"""


def study_of(folder: Path, text: str) -> StudyConfig:
    path = folder / "mine.yaml"
    path.write_text(text)
    return StudyConfig(file=str(path))


def test_a_recipe_is_the_shipped_one_then_the_shared_settings_then_its_own(tmp_path: Path) -> None:
    study = read_study(study_of(tmp_path, GOOD))
    assert (study.name, study.seeds, study.minutes, study.steps, study.shards) == ("mine", 2, 0.5, None, "tiles")
    full, plain = study.recipes["full"], study.recipes["plain"]
    assert full.objective.adversary and full.data.image_size == 96  # crc5_small's, and switched on
    assert (full.run.batch_size, full.optim.warmup_steps) == (128, 7)
    assert (plain.method.name, plain.optim.warmup_steps, plain.views.crop_scale) == ("simclr", 3, (0.3, 0.9))
    assert (study.probe.train, study.probe.test, study.probe.labels) == ("tiles", ("a", "b"), (0.1, 1.0))
    assert study.probe.seeds == 4 and not study.probe.imagenet and study.probe.floors


def test_the_command_lines_data_win(tmp_path: Path) -> None:
    config = replace(study_of(tmp_path, GOOD), shards="x", train="y", test=("z",))
    study = read_study(config)
    assert (study.shards, study.probe.train, study.probe.test) == ("x", "y", ("z",))


def test_the_shipped_study_compares_the_methods_parts() -> None:
    assert "study_crc5" not in recipes() and find_study("study_crc5").name == "study_crc5.yaml"
    study = read_study(StudyConfig(file="study_crc5", shards="x", test=("y",)))
    assert list(study.recipes) == ["ca2cl", "no_cluster", "no_adversary", "simclr"]
    parts = {
        name: (one.method.name, one.objective.adversary, one.objective.cluster_weight)
        for name, one in study.recipes.items()
    }
    assert parts["ca2cl"] == ("ca2cl", True, 0.1) and parts["no_cluster"] == ("ca2cl", True, 0.0)
    assert parts["no_adversary"] == ("ca2cl", False, 0.1) and parts["simclr"][0] == "simclr"
    first = study.recipes["ca2cl"]
    for one in study.recipes.values():  # they differ in nothing else
        assert replace(one, method=first.method, objective=first.objective) == first


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: 2", "seed: 2", "unknown setting seed: did you mean seeds?"),
        ("seeds: 2", "seeds: 0", "seeds is '0': use a whole number"),
        ("minutes: 0.5", "minutes: soon", "minutes is 'soon'"),
        ("minutes: 0.5", "minutes: -1", "minutes is '-1': use a positive number"),
        ("minutes: 0.5", "", "give either minutes"),
        ("minutes: 0.5", "minutes: 1\nsteps: 9", "give either minutes"),
        ("recipe: simclr", "recipe: simclt", "recipe plain: no recipe 'simclt': did you mean simclr?"),
        ("adversary: true", "adversry: true", "recipe full: unknown setting objective.adversry: did you mean"),
        ("batch_size: 128", "batch_size: 100", "recipe full: run.batch_size is 100"),
        ("batch_size: 128", "epochs: 3", "run.epochs is decided by minutes or steps"),
        ("batch_size: 128", "seed: 3", "run.seed is decided by seeds"),
        ("recipe: simclr", "method: {name: 'evil.module:Class'}", "method.name names code"),
        ("recipe: simclr", "tracking: {uri: x}", "tracking is decided by --tracking.*"),
        ("  full:", "  ../full:", "recipe ../full: a recipe's name becomes a folder"),
        ("{recipe: crc5_small, objective: {adversary: true}}", "crc5_small", "give settings by name"),
        ("labels:", "lables:", "probe: unknown setting lables: did you mean labels?"),
        ("seeds: 4", "encoder: x", "probe.encoder is the study's to decide"),
        ("test: [a, b],", "", "probe.test is not set: give --test"),
        ("shards: tiles", "", "shards is not set: give --shards"),
        ("seeds: 2", "seeds: 2\nseeds: 3", "line 4: seeds is there twice"),
        ("seeds: 2", "seeds: [2]", "seeds is ['2']: give one value"),
        ("recipes:", "recipes: {}\nold:", "unknown setting old"),
        ("probe:", "probe: 3\nsettings2:", "unknown setting settings2: did you mean settings?"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    with pytest.raises(InputError) as refused:
        read_study(study_of(tmp_path, GOOD.replace(old, new, 1)))
    assert message in str(refused.value), refused.value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere.yaml",), "file 'nowhere.yaml' is not there; give a YAML file, or a shipped study: study_crc5"),
        (("study_crc5", "--list", "--table"), "list and table exclude each other"),
        (("study_crc5", "--job", "-1"), "job is -1: use 0 or more"),
        (("study_crc5", "--shards", "gone", "--test", "gone"), "gone"),
    ],
)
def test_bad_usage_ends_with_2_and_leaves_nothing(
    words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words]) == 2
    assert message in capfd.readouterr().err and not list(tmp_path.iterdir())
