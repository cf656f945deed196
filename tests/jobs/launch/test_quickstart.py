"""The quickstart's commands are ones that the command line takes, and (slow) they run."""

import os
import sys
from pathlib import Path

import pytest

from ca2cl.cli.parser import parse
from ca2cl.cli.quickstart import QuickstartConfig, commands, is_newer
from ca2cl.errors import InputError
from tests.support.jobs import start


def test_every_command_parses() -> None:
    """Through the real parser: a renamed setting or recipe must not wait for a user to find it."""
    found = []
    for command in commands(QuickstartConfig(steps=7)):
        _, verb, *arguments = command.words
        found.append(parse(verb, arguments))
    train, test, doctor, pretrain, probe, report = found
    assert train.out == doctor.views[0] == pretrain.data.shards == probe.train
    assert test.out == report.test and probe.test == (test.out,)
    assert pretrain.run.output_dir == probe.encoder == report.run and pretrain.run.steps == 7
    assert doctor.strength == pretrain.views.strength  # the sheet shows what training sees


@pytest.mark.parametrize("change", [{"tiles_per_class": 19}, {"steps": 0}])
def test_too_little_is_refused(change: dict[str, int]) -> None:
    with pytest.raises(InputError, match="use (20|1) or more"):
        QuickstartConfig(**change)


def test_only_what_is_older_than_its_source_is_made_again(tmp_path: Path) -> None:
    source, result = tmp_path / "source", tmp_path / "result"
    assert not is_newer(result, source)
    result.write_text("made")
    assert not is_newer(result, source)  # which a failure may have removed
    source.write_text("there")
    os.utime(source, ns=(5, 5))
    assert is_newer(result, source)
    os.utime(result, ns=(4, 4))
    assert not is_newer(result, source)


@pytest.mark.slow
def test_the_whole_pipeline_runs_and_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "ca2cl", "quickstart", "here", "--tiles_per_class", "20", "--steps", "3"]
    first = start(arguments, tmp_path)
    assert first.returncode == 0, first.stderr
    made = ("views.png", "probe.json", "probe-confusion.png", "report.html", "run/encoder/encoder.safetensors")
    for name in made:
        assert (tmp_path / "here" / name).is_file(), name
    assert "Open first:\n  here/report.html" in first.stdout
    assert "slides" in first.stdout  # test slides are resampled
    times = [(tmp_path / "here" / name).stat().st_mtime_ns for name in made]
    again = start(arguments, tmp_path)
    assert again.returncode == 0, again.stderr
    assert [(tmp_path / "here" / name).stat().st_mtime_ns for name in made] == times
    assert (tmp_path / "here" / "run" / "journal.jsonl").read_text().count('"loss"') == 3
