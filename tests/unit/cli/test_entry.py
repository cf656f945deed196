"""The command line: help, recipes, spelling, exit codes."""

import re
from pathlib import Path

import pytest

from ca2cl.cli import main
from ca2cl.cli.examples import EXAMPLES
from ca2cl.cli.parser import parse, recipes
from ca2cl.cli.verbs import VERBS


def outcome(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(list(arguments))
    return code, *capfd.readouterr()


def test_without_a_verb_the_verbs_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",), ("help",)):
        code, out, _ = outcome(capfd, *arguments)
        assert code == 0
        assert all(f"  {verb}" in out for verb in VERBS)


PROBE = ("probe", "--encoder", "a", "--train", "b", "--test", "c")
SHOWN = ("quickstart", "completion", "sync")
"""Verbs whose --help shows every setting."""
PARSED = [name for name, verb in VERBS.items() if not verb.raw]


@pytest.mark.parametrize("verb", PARSED)
def test_help_all_of_every_verb_explains_every_setting(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capfd, *verb.split(), "--help_all")
    assert code == 0
    assert not re.search(r"\bnull\b|Literal|Union|typing", out)  # the explanations' word is none
    blocks = re.split(r"\n  (?=--)", out)[1:]
    assert blocks or verb == "completion"  # which has one setting, given by its place
    for block in blocks:
        line, _, text = block.partition("\n")
        assert len(text.split()) >= 2, f"{verb}: {line} has no explanation"
    for flag in ("-h", "--help", "--help-all"):
        assert outcome(capfd, *verb.split(), flag, "--nothing")[0] == 0


@pytest.mark.parametrize("verb", PARSED)
def test_help_is_short_and_has_three_examples_of_the_verb(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, out, _ = outcome(capfd, *verb.split(), "--help")
    _, every, _ = outcome(capfd, *verb.split(), "--help_all")
    assert len(EXAMPLES[verb]) == 3
    words = verb.replace(" plan", " --plan")
    assert all(f"ca2cl {words}" in line for _, line in EXAMPLES[verb])
    assert out.count("\n  # ") == 3 and (f"ca2cl {verb} --help_all shows" in out) == (verb not in SHOWN)
    assert max(map(len, out.splitlines())) <= 100
    assert len(out.splitlines()) < 75
    names = re.findall(r"^  --([\w.]+)", out, flags=re.MULTILINE)
    assert all(f"\n  --{name}" in every for name in names)


def test_the_first_word_of_a_group_lists_its_verbs(capfd: pytest.CaptureFixture[str]) -> None:
    for arguments in (("encoders",), ("encoders", "--help"), ("help", "encoders")):
        code, out, _ = outcome(capfd, *arguments)
        assert code == 0
        assert [verb for verb in VERBS if f"  {verb}" in out] == [v for v in VERBS if v.startswith("encoders ")]


def test_the_last_positional_takes_every_word_and_a_flag_needs_no_value() -> None:
    words = ["1", "champion", "models:/a@b"]
    settings = parse("encoders compare", [*words, "--json", "--tracking.root", "x"])
    assert settings.encoders == tuple(words) and settings.json and settings.tracking.root == "x"
    assert not parse("encoders compare", [*words, "--json", "false"]).json
    assert parse("encoders list", ["--metrics", "AP", "1"]).metrics == ("AP", "1")


def test_hyphens_are_taken_for_underscores(capfd: pytest.CaptureFixture[str]) -> None:
    settings = parse("encoders promote", ["3", "--if-better=a-b", "--exit-code"])
    assert (settings.what, settings.if_better, settings.exit_code) == ("3", "a-b", True)
    assert parse("encoders import", ["x", "--input-size", "64"]).input_size == 64


def test_doctors_recipe_is_pretrains_or_that_of_the_views() -> None:
    planned = parse("doctor", ["--recipe", "crc5_small", "--batch_size", "32"])
    assert (planned.recipe, planned.image_size, planned.batch_size, planned.lanes) == ("crop", 96, 32, 64)
    assert parse("doctor", ["--batch_size", "32", "--recipe", "crc5_small"]).batch_size == 64  # the last one wins
    assert parse("doctor", ["--recipe=crop"]).recipe == "crop"
    named = parse("doctor", ["--recipe", "crc5_small"]), parse("doctor", ["--recipe=crop"])
    assert [one.pretrain_recipe for one in named] == ["crc5_small", None]  # which the next commands name


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_resolves(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capfd, "pretrain", "--recipe", recipe, "--optim.lr", "0.125", "--print_config")
    assert code == 0
    assert "lr: 0.125" in out and "epsilon_mode" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretain",), "no verb 'pretain': did you mean pretrain?"),
        (("pretrain", "--data.shard", "x"), "unknown setting data.shard: did you mean data.shards?"),
        (("pretrain", "--run.out=x"), "unknown setting run.out: did you mean run.output_dir?"),
        (("shard", "a", "b", "--unlabel"), "unknown setting unlabel: did you mean unlabelled?"),
        (("probe", "runs/a", "--train", "b"), "'runs/a' has no name: did you mean --encoder runs/a?"),
        (("probe", "a", "b", "c", "d"), "did you mean --encoder a --train b --test c?"),
        (("probe", "d", *PROBE[1:]), "'d' belongs to no setting; put values behind their flag"),
        (("pretrain", "--recipe", "smok"), "no recipe 'smok': did you mean smoke?"),
        (("pretrain", "--optim.rl", "1"), "unknown setting optim.rl: did you mean optim.lr?"),
        (("pretrain", "--config", "nowhere.yaml"), "nowhere.yaml"),
        (("pretrain", "--optim.lr", "fast"), "optim.lr is 'fast': give a number"),
        (("pretrain", "--lr", "1"), "unknown setting lr: did you mean optim.lr?"),
        (("pretrain", "--name", "x"), "unknown setting name: did you mean method.name or optim.name?"),
        (("pretrain", "--optim.lr"), "optim.lr has no value: give a number"),
        (("pretrain", "--recipe"), "recipe has no value: give continue_resnet50"),
        (("pretrain", "--config"), "config has no value: give a file of YAML"),
        (("pretrain", "--data", "."), "data is '.', a folder: give a YAML file, or single settings: --data.shards"),
        (("ui", "-p", "5"), "unknown setting -p: settings begin with two hyphens"),
        (("embed", "--encoder", "x"), "SOURCE and OUT must be given: ca2cl embed SOURCE OUT; see ca2cl embed --help"),
        (("embed", "--encoder", "x", "tiles"), "OUT must be given: ca2cl embed SOURCE OUT; see ca2cl embed --help"),
        (("embed",), "--encoder, SOURCE and OUT must be given: ca2cl embed SOURCE OUT ...; see"),
        (("pretrain", "--qqq", "x"), "unknown setting qqq: ca2cl pretrain --help_all lists all of them"),
        (("pretrain", "--run.steps", "1.5"), "run.steps is '1.5': give a whole number or none"),
        (("pretrain", "--model.mean", "1", "2"), "model.mean is '1 2': give 3 numbers or none"),
        (("pretrain", "--run.fsdp", "maybe"), "'maybe' belongs to no setting"),
        (("doctor", "--views", "x.png"), "views is 'x.png': give 2 texts or none"),
        (
            ("probe", "--encoder", "a", "--train", "b", "--test", "c", "--labels", "few"),
            "labels is 'few': give numbers",
        ),
        (("probe", "--encoder", "a", "--train", "b", "--test", "c", "--classifiers", "svm"), "logistic, sgd or knn"),
        (("probe", "--encoder", "a", "--train", "b", "--test", "c", "--strength", "x"), "give a number, auto or none"),
        (("probe",), "--encoder, --train and --test must be given; see ca2cl probe --help"),
        (("pretrain", "--optim.lr", "-1"), "optim.lr is -1.0: use more than 0"),
        (("pretrain", "--model.norm", "batch"), "model.norm is 'batch': use sync, frozen or lane_group"),
        (("shard",), "SOURCE and OUT"),
        (("probe", "--train", "a", "--test", "b"), "encoder"),
        (("doctor", "--lanes", "0"), "lanes is 0"),
        (("sync", "nowhere"), "nowhere"),
        (("encoders", "lst"), "no verb 'encoders lst': did you mean encoders list?"),
        (("encodrs",), "no verb 'encodrs': did you mean encoders?"),
        (("encoders", "show"), "WHAT must be given: ca2cl encoders show WHAT"),
        (("encoders", "show", "1"), "no store there"),
        (("encoders", "compare", "1"), "give two or more"),
        (("encoders", "promote", "1", "--alias", "latest"), "MLflow's own"),
        (("encoders", "promote", "1", "--alias", "v1"), "nothing like v1"),
        (("encoders", "promote", "1", "--than", "best"), "needs if_better"),
        (("encoders", "import", "random", "--input_size", "8"), "use 32 or more"),
        (("encoders", "import", "random", "--name", "a/b"), "use letters"),
        (("encoders", "import", "nowhere.pth"), "not there"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], message: str, capfd: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, _, error = outcome(capfd, *arguments)
    assert code == 2
    (line,) = error.splitlines()
    assert line.startswith("ca2cl: error: ") and message in line, line
    assert not list(tmp_path.iterdir())
