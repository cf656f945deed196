"""The command line of commit f1aef52 is taken: verbs, settings, recipes, documented commands, exit codes.

``artefacts/facts.py`` wrote down what that version took and answered, with that version's own parser.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ca2cl.cli import main
from ca2cl.cli.parser import parse

FACTS = json.loads((Path(__file__).parent / "artefacts" / "f1aef52.json").read_text())
NEW_DEFAULTS: dict[str, dict[str, Any]] = {
    # chosen on held-out training tiles; .3 had been chosen on test tiles
    "probe": {"sgd_lr": 3.0},
    # left open, so that --protocol original can have its authors' values; the honest ones are as they were
    "finetune": {
        "epochs": None, "min_steps": None, "batch_size": None, "held_out": None, "patience": None, "augment": "auto",
    },
    "reproduce nct": {"batch_size": None, "augment": "auto"},
    # those of the weights where they state some, and else ImageNet's as before
    "pretrain": {"model.mean": None, "model.std": None},
    # the authors' own schedule; the rate left open is that of the optimizer, of SGD as before
    "detect": {"warmup": 1000, "lr": None},
    # tissue in which colour tells little, and long enough for an encoder that is ahead of its baselines
    "quickstart": {"tiles_per_class": 150, "steps": 300},
    # a bare number or alias is looked for among all models; ca2cl-encoder comes first
    **{f"encoders {verb}": {"name": None} for verb in ("show", "compare", "promote")},
}  # fmt: skip
"""Defaults that have changed since, each for a reason. Every old value is still taken."""
NEW_ENDS = {"": 0, "encoders": 0}
"""Exit codes that have changed since: who asks for the list of verbs gets it, and that is no error."""


def settings(verb: str, words: list[str]) -> dict[str, Any]:
    """Settings by their dotted names, as JSON holds them."""
    found = parse(verb, words)
    assert found is not None
    return dict(_flat(json.loads(json.dumps(dataclasses.asdict(found)))))


def _flat(groups: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in groups.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def spelt(old: dict[str, Any]) -> list[str]:
    """Every setting as a flag and its words; what is left open is left out."""
    words = []
    for name, value in old.items():
        items = value if isinstance(value, list) else [value]
        told = [str(item).lower() if isinstance(item, bool) else str(item) for item in items]
        words += [] if value is None else [f"--{name}", *(told or ["[]"])]
    return words


@pytest.mark.parametrize("verb", FACTS["settings"])
def test_every_setting_is_there_with_its_meaning_and_default(verb: str) -> None:
    old = FACTS["settings"][verb]
    now = settings(verb, FACTS["needed"].get(verb, []))
    assert old.keys() <= now.keys()
    assert {name: now[name] for name in old if now[name] != old[name]} == NEW_DEFAULTS.get(verb, {})
    taken = settings(verb, spelt(old))
    assert {name: taken[name] for name in old if old[name] is not None} == {
        name: value for name, value in old.items() if value is not None
    }


@pytest.mark.parametrize("words", FACTS["documented"], ids=" ".join)
def test_every_documented_command_is_taken(words: list[str]) -> None:
    length = 2 if " ".join(words[:2]) in FACTS["settings"] else 1
    assert settings(" ".join(words[:length]), words[length:])


@pytest.mark.parametrize("name", FACTS["recipes"])
def test_recipes_mean_what_they_meant(name: str, tmp_path: Path) -> None:
    """Its old file as --config, and the shipped one of that name. Settings that are new do nothing in it."""
    old, file = FACTS["recipes"][name], tmp_path / "old.yaml"
    file.write_text(old["text"])
    for words in (["--config", str(file)], ["--recipe", name]):
        now = settings("pretrain", words)
        assert {setting: now[setting] for setting in old["settings"]} == old["settings"] | NEW_DEFAULTS["pretrain"]
        new = now.keys() - old["settings"].keys()
        assert {setting: now[setting] for setting in new} == {
            setting: value for setting, value in settings("pretrain", []).items() if setting in new
        }


@pytest.mark.parametrize("command", FACTS["ends"])
def test_exit_codes_are_the_same(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code = main(shlex.split(command))
    except SystemExit as end:  # accelerate's own parser, of `launch`
        code = int(str(end.code))
    assert code == NEW_ENDS.get(command, FACTS["ends"][command])
