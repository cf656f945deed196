"""The quickstart's commands are ones that the command line takes, and (slow) they run."""

import sys
from pathlib import Path

import pytest

from ca2cl.cli.parser import parse
from ca2cl.cli.quickstart import QuickstartConfig, commands
from ca2cl.errors import InputError
from tests.support.jobs import start


def test_every_command_parses() -> None:
    """Through the real parser: a renamed setting or recipe must not wait for a user to find it."""
    found = []
    for command in commands(QuickstartConfig(steps=7)):
        verb, *arguments = command[command.index("ca2cl") + 1 :]
        found.append(parse(verb, arguments))
    assert [type(settings).__name__ for settings in found] == ["ShardConfig"] * 2 + ["DoctorConfig", "PretrainConfig"]
    assert found[0].out == found[2].views[0] == found[3].data.shards
    assert found[3].run.steps == 7


@pytest.mark.parametrize("change", [{"tiles_per_class": 9}, {"steps": 0}])
def test_too_little_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="use 10? or more"):
        QuickstartConfig(**change)


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "ca2cl", "quickstart", "here", "--tiles_per_class", "20", "--steps", "3"]
    first = start(arguments, tmp_path)
    assert first.returncode == 0, first.stderr
    for name in ("views.png", "probe.json", "probe-confusion.png", "run/encoder/encoder.safetensors"):
        assert (tmp_path / "here" / name).is_file(), name
    assert "colour histogram" in first.stdout and "random encoder" in first.stdout
    journal = (tmp_path / "here" / "run" / "journal.jsonl").read_text()
    again = start(arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "here" / "run" / "journal.jsonl").read_text().count('"loss"') == journal.count('"loss"') == 3
