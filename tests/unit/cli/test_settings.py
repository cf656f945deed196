"""Settings in YAML files and on the command line: what is read, what is none, what is home, what is refused."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from ca2cl.cli import main
from ca2cl.cli.parser import parse
from ca2cl.cli.verbs import VERBS
from ca2cl.errors import InputError
from ca2cl.pretrain.config import PretrainConfig


def settings(folder: Path, text: str | bytes, *more: str) -> PretrainConfig:
    path = folder / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    made = parse("pretrain", ["--config", str(path), *more])
    assert isinstance(made, PretrainConfig)
    return made


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "run:\n  # steps: 3\n", "run:\ndata: {}\n", "---\n...\n", "null\n", "run: ~\n"],
)
def test_a_file_or_group_without_settings_says_nothing(text: str, tmp_path: Path) -> None:
    assert settings(tmp_path, text) == PretrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: []\n", "line 1: data holds a list"),
        ("seed: 1\nrun: 3\n", "line 1: unknown setting seed"),
        ("run: fast\n", "line 1: run holds one value"),
        ("- run\n", "line 1: the file holds a list"),
        ("fast\n", "line 1: the file holds one value"),
        ("run:\n  seed:\n", "line 2: run.seed has no value"),
        ("run: {seed: [1]}\n", "run.seed is a list: give one value"),
        ("run: {seed: {a: 1}}\n", "run.seed holds a group of settings: give a value"),
        ("model:\n  mean: [0.1, , 0.2]\n", "not YAML"),
        ("model:\n  mean: [0.1, null, 0.2]\n", "line 2: model.mean holds nothing"),
        ("run: {seed: 1}\nrun: {seed: 2}\n", "line 2: run is there twice"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3: seed is there twice"),
        ("run:\n\tseed: 1\n", "line 2: not YAML"),
        ("run: {seed: 1}\n---\nrun: {seed: 2}\n", "not YAML (but found another document)"),
        ("a: &a [*a]\n", "unknown setting a"),
        ("run: &a {seed: *a}\n", "run.seed holds a group of settings"),
        ("run: !!python/object/apply:os.getcwd []\n", "run holds tag:yaml.org,2002:python/object/apply:os.getcwd"),
        ("run: !!python/object:os.x {}\n", "run holds tag:yaml.org,2002:python/object:os.x"),
        ("run: {seed: !mine 1}\n", "run.seed holds !mine"),
        ("run: {sed: 1}\n", "line 1: unknown setting run.sed: did you mean run.seed?"),
        ("1: 2\n", "line 1: unknown setting 1"),
        ("[1]: 2\n", "a setting's name is one word"),
        (b"run: {output_dir: caf\xe9}\n", "give a file of YAML in UTF-8"),
        (b"\x80\x04\x95\x00", "give a file of YAML in UTF-8"),
        ("run: {seed: many}\n", "run.seed"),
    ],
)
def test_another_form_is_one_line_that_names_file_and_place(text: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        settings(tmp_path, text)
    assert message in str(caught.value)
    assert "c.yaml" in str(caught.value) or text == "run: {seed: many}\n"


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", ""])
def test_a_config_that_is_no_file(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="give a file of YAML"):
        parse("pretrain", [f"--config={path}"])


def test_values_are_read_as_on_the_command_line(tmp_path: Path) -> None:
    text = """
        run: {precision: no, seed: "7", output_dir: 2024-01-01, batch-size: 128, resume: "null"}
        optim: &o {lr: 1e-3, clip_norm: 0.5}
        model: {mean: [0.1, .2, 3e-1]}
        views: {crop_scale: [0.5, 1]}
        tracking: {run_name: "0x10", experiment: 'ä b'}
        objective: {adversary: false}
    """
    made = settings(tmp_path, text, "--objective.adversary", "--model.std", "1", "2", "3", "--optim.momentum", "0.5")
    run = made.run
    assert (run.precision, run.seed, run.output_dir, run.batch_size) == ("no", 7, "2024-01-01", 128)
    assert run.resume == "null"
    assert (made.optim.lr, made.optim.clip_norm, made.optim.momentum) == (1e-3, 0.5, 0.5)
    assert (made.model.mean, made.model.std, made.views.crop_scale) == ((0.1, 0.2, 0.3), (1, 2, 3), (0.5, 1))
    assert (made.tracking.run_name, made.tracking.experiment, made.objective.adversary) == ("0x10", "ä b", True)


def test_later_settings_win_whether_file_recipe_or_flag(tmp_path: Path) -> None:
    (tmp_path / "group.yaml").write_text("seed: 3\n", encoding="utf-8")
    (tmp_path / "base.yaml").write_text("run: &base {seed: 2, log_every: 5}\n", encoding="utf-8")
    files = ["--recipe", "smoke", "--config", str(tmp_path / "base.yaml")]
    assert parse("pretrain", files).run.seed == 2
    assert parse("pretrain", [*files, "--run.seed", "4"]).run.seed == 4
    assert parse("pretrain", ["--run.seed", "4", *files]).run.seed == 2
    assert parse("pretrain", [*files, "--run", str(tmp_path / "group.yaml")]).run.seed == 3
    merged = "data: {<<: {lanes: 8}, workers: 1, lanes: 16}\n"
    made = settings(tmp_path, merged)
    assert (made.data.lanes, made.data.workers) == (16, 1)


def test_a_length_replaces_the_other_of_an_earlier_file_alone(tmp_path: Path) -> None:
    (tmp_path / "steps.yaml").write_text("run: {steps: 7}\n", encoding="utf-8")
    (tmp_path / "both.yaml").write_text("run: {steps: 7, epochs: 2}\n", encoding="utf-8")
    recipe, steps, both = ["--recipe", "crc5_small"], ["--config", f"{tmp_path}/steps.yaml"], f"{tmp_path}/both.yaml"
    for arguments, length in {
        (*recipe, "--run.steps", "30"): (None, 30),
        (*recipe, "--run.steps=30"): (None, 30),
        ("--recipe", "smoke", "--run.epochs", "2"): (2, None),
        (*recipe, *steps): (None, 7),
        (*recipe, *steps, "--run.epochs", "3"): (3, None),
        (*recipe, "--run.steps", "none"): (18, None),
        (*recipe, "--run.steps", "30", "--run.epochs", "2"): (2, 30),
        ("--run.steps", "30", *recipe): (18, 30),
        ("--config", both): (2, 7),
    }.items():
        run = parse("pretrain", list(arguments)).run
        assert (run.epochs, run.steps) == length, arguments


def test_what_print_config_shows_is_taken_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--recipe", "crc5_small", "--tracking.register_as", "none", "--run.output_dir", "x y", "--run.seed", "9"]
    assert main(["pretrain", *flags, "--print_config"]) == 0
    assert settings(tmp_path, capfd.readouterr().out) == parse("pretrain", flags)
    assert main(["probe", "--print_config"]) == 0  # what is to be given yet is null in it
    (tmp_path / "probe.yaml").write_text(capfd.readouterr().out, encoding="utf-8")
    given = ["--encoder", "random", "--train", "a", "--test", "b"]
    assert parse("probe", ["--config", str(tmp_path / "probe.yaml"), *given]) == parse("probe", given)
    given += ["--output_dir", "c"]
    assert main(["finetune", *given, "--print_config"]) == 0
    (tmp_path / "tune.yaml").write_text(capfd.readouterr().out, encoding="utf-8")
    assert parse("finetune", ["--config", str(tmp_path / "tune.yaml")]) == parse("finetune", given)


@pytest.mark.parametrize("word", ["none", "None", "NONE", "null", "Null"])
def test_none_leaves_a_setting_open(word: str, tmp_path: Path) -> None:
    names = ["run.micro_batch_size", "optim.clip_norm", "tracking.register_as", "tracking.uri", "data.cache_gb"]
    flags = [part for name in names for part in (f"--{name}", word)]
    for made in (
        parse("pretrain", flags),
        parse("pretrain", [f"--{name}={word}" for name in names]),
        settings(tmp_path, "".join(f"{name}: {word}\n" for name in names)),
        settings(tmp_path, "".join(f"{name}: '{word}'\n" for name in names)),
    ):
        open_ones = made.run.micro_batch_size, made.optim.clip_norm, made.tracking.register_as, made.tracking.uri
        assert open_ones == (None,) * 4 and made.data.cache_gb is None
    assert parse("doctor", ["--views", word]).views is None
    tuning = ["--encoder", "a", "--train", "b", "--test", "c", "--output_dir", "d"]  # (a group with other defaults)
    assert parse("finetune", [*tuning, "--tracking.run_name", word]).tracking.run_name is None


def test_none_is_a_word_where_a_setting_cannot_be_left_open() -> None:
    assert parse("pretrain", ["--tracking.experiment", "none"]).tracking.experiment == "none"
    flags = ["--encoder", "a", "--train", "b", "--test", "c", "--output_dir", "d", "--augment", "none"]
    assert parse("finetune", flags).augment == "none"
    with pytest.raises(InputError, match=r"optim\.lr"):
        parse("pretrain", ["--optim.lr", "none"])


def test_no_setting_may_be_left_open_and_has_none_for_a_word() -> None:
    """`--augment none` once was no augmentation, and would have been the default without a line."""
    for name, verb in VERBS.items():
        if not verb.raw:
            kind = getattr(importlib.import_module(verb.settings_module), verb.settings)
            hints = get_type_hints(kind).items()
            both = [field for field, hint in hints if type(None) in get_args(hint) and "'none'" in str(hint)]
            assert not both, (name, both)


def test_the_home_folder_in_every_setting_of_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    assert parse("shard", ["~/a b", "~/out"]).out == "/h/out"
    text = "run: {output_dir: ~/r}\ndata: {shards: '~/s'}\n"
    made = settings(tmp_path, text, "--tracking.root=~/t", "--run.resume=~/c")
    assert (made.run.output_dir, made.data.shards) == ("/h/r", "/h/s")
    assert (made.tracking.root, made.run.resume) == ("/h/t", "/h/c")
    assert parse("pretrain", ["--data.cache_dir", "~"]).data.cache_dir == "/h"
    probe = parse("probe", ["--encoder", "~/e", "--train", "~/a", "--test", "~/b", "near=~/c", "--against", "~/f"])
    assert (probe.encoder, probe.train, probe.test, probe.against) == ("/h/e", "/h/a", ("/h/b", "near=/h/c"), ("/h/f",))
    (tmp_path / "f.yaml").write_text("encoder: a\ntrain: b\ntest: c\noutput_dir: ~/d\ntracking: {root: ~/t}\n")
    tuning = parse("finetune", ["--config", str(tmp_path / "f.yaml")])
    assert (tuning.output_dir, tuning.tracking.root, tuning.tracking.register_as) == ("/h/d", "/h/t", None)
    quoted = parse("probe", ["--encoder", "a", "--train", "b", "--test", '["~/b"]'])
    assert quoted.test == ("/h/b",)


@pytest.mark.parametrize(
    "text", ["s3://b/~/x", "file://~/x", "sqlite:///~/x", "a/~/b", "x~", "~nobody-of-this-name/x", "http://h/?q=~/x"]
)
def test_what_is_not_the_home_folder_stays(text: str) -> None:
    assert parse("pretrain", ["--data.shards", text]).data.shards == text


def test_a_file_starts_no_program(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("launcher: rm -r\n", encoding="utf-8")
    with pytest.raises(InputError, match="launcher starts a program; give it on the command line"):
        parse("study", ["study_crc5", "--config", str(tmp_path / "c.yaml")])
    assert parse("study", ["study_crc5", "--launcher", "srun"]).launcher == "srun"


def test_a_config_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    settings(tmp_path, "run: {seed: 5}\n")
    assert parse("pretrain", ["--config=~/c.yaml"]).run.seed == 5


def test_a_folder_whose_name_ends_like_a_group_is_a_folder() -> None:
    """``t/run`` less two characters is ``run``, as ``--run`` is."""
    run = parse("pretrain", ["--run.output_dir", "t/run", "--run.seed", "3"]).run
    assert (run.output_dir, run.seed) == ("t/run", 3)
