"""``ca2cl quickstart``: the whole pipeline on synthetic tissue.

It runs the commands that a user would type, and prints each.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from annotated_types import Ge

from ca2cl.common.console.summary import PART
from ca2cl.common.ranges import check_ranges
from ca2cl.common.records import parse_json
from ca2cl.errors import InputError
from ca2cl.store.locate import CONFIG_VARIABLE

POSITIONAL = ("folder",)
_TILE_SIZE = 64
_TEST_SEED = 1
_TILES_PER_SLIDE = 5  # of each class
_SLIDES = "(S[0-9]+)"


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Draw synthetic tissue, shard it, draw its views, train an encoder, probe it and write its report.

    The classes of the tissue differ in structure; stains differ from slide to slide and say nothing of the class. Every
    command is printed before it runs, so that you can repeat it on your own tiles. If it is stopped, run it again in
    the same folder to resume.
    """

    folder: str = "ca2cl-quickstart"
    """Output folder: tiles, shards, run, MLflow store, pictures, report."""
    tiles_per_class: int = 150
    """Training tiles for each of nine classes; half as many, of other slides, are drawn for testing."""
    steps: int = 300
    """Optimizer steps of pre-training."""

    def __post_init__(self) -> None:
        check_ranges(self, tiles_per_class=Ge(20), steps=Ge(1))


class Command(NamedTuple):
    """A command, with what it makes of what: it is left out where its result is newer than its source."""

    words: list[str]
    result: str = ""
    """File in the folder; empty where the command itself sees what is done already."""
    source: str = ""


def run(config: QuickstartConfig) -> int:
    """Run every command in turn; returns the first exit code that is not 0, or 0.

    Raises:
        InputError: the folder cannot be made or written.
    """
    started, folder = time.monotonic(), Path(config.folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: {error.strerror}; give a folder you can write") from None
    _draw(folder, config.tiles_per_class)
    for command in commands(config):
        code = _start(command, folder)
        if code:
            return code
    sys.stdout.write(_summary(folder, time.monotonic() - started))
    return 0


def _draw(folder: Path, tiles_per_class: int) -> None:
    from ca2cl.data.synthetic.tissue import write_tissue

    for name, count, seed in (("train", tiles_per_class, 0), ("test", tiles_per_class // 2, _TEST_SEED)):
        root, slides = folder / "tissue" / name, count // _TILES_PER_SLIDE
        if root.exists():
            _say(f"{root}: there already, kept as it is")
            continue
        _say(f"drawing {count} {name} tiles a class, of {slides} slides, into {root}")
        write_tissue(root, count, size=_TILE_SIZE, seed=seed, slides=slides)


def commands(config: QuickstartConfig) -> list[Command]:
    """The commands, as a user would type them in the folder."""
    weights = "run/encoder/encoder.safetensors"
    return [
        Command(["ca2cl", "shard", "tissue/train", "shards/train", "--group_pattern", _SLIDES]),
        Command(["ca2cl", "shard", "tissue/test", "shards/test", "--group_pattern", _SLIDES]),
        Command(
            ["ca2cl", "doctor", "--views", "shards/train", "views.png", "--recipe", "quickstart"],
            "views.png", "shards/train/manifest.json",
        ),
        Command(
            ["ca2cl", "pretrain", "--recipe", "quickstart", "--data.shards", "shards/train",
             "--run.steps", str(config.steps), "--run.output_dir", "run"],
        ),
        Command(
            ["ca2cl", "probe", "--encoder", "run", "--train", "shards/train", "--test", "shards/test",
             "--labels", "0.1", "1.0", "--classifiers", "logistic", "knn", "--imagenet", "false",
             "--strength", "1", "--calibrate", "false", "--output", "probe.json"],
            "probe.json", weights,
        ),
        Command(["ca2cl", "report", "run", "report.html", "--test", "shards/test"], "report.html", "probe.json"),
    ]  # fmt: skip


def _start(command: Command, folder: Path) -> int:
    """Run a command in ``folder``, whether or not the environment's programs are on the path."""
    _say("\n$ " + shlex.join(command.words))
    if command.result and is_newer(folder / command.result, folder / command.source):
        _say(f"{folder / command.result}: there already, kept as it is")
        return 0
    # made-up tissue needs no network, so nothing asks for one
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", CONFIG_VARIABLE: "", PART: "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    arguments = [sys.executable, "-m", *command.words]
    return subprocess.run(arguments, cwd=folder, env=environment, check=False).returncode


def is_newer(result: Path, source: Path) -> bool:
    """True if both are there and the result was written after the source."""
    try:
        return result.stat().st_mtime >= source.stat().st_mtime
    except OSError:
        return False


def _summary(folder: Path, seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    found = parse_json((folder / "probe.json").read_text(encoding="utf-8")).get("verdict", {})
    done = textwrap.fill(f"Done in {minutes} min {rest} s. {found.get('sentence', '')}", 79)
    return f"""
{done}

Open first:
  {folder / "report.html"}

Then:
  {folder / "views.png"}: tiles beside the views that training saw
  {folder / "run/figures/curves.png"}: the losses
  {folder / "probe-confusion.png"}: which classes are taken for which
  ca2cl ui {folder / "run"}: MLflow's pages

Next, with your own tiles, in one folder or a folder for each class:
{_activation()}  ca2cl shard TILES shards --group_pattern '(TCGA-..-....)'   # slide or patient
  ca2cl pretrain --recipe crc5_small --data.shards shards --run.output_dir runs/first
  ca2cl report runs/first report.html
"""


def _activation() -> str:
    """The line that brings ``ca2cl`` onto the path; empty where it is there."""
    programs = Path(sys.prefix) / "bin"
    if shutil.which("ca2cl") == str(programs / "ca2cl") or not (programs / "activate").is_file():
        return ""
    inside = programs.is_relative_to(Path.cwd())
    script = programs.relative_to(Path.cwd()) / "activate" if inside else programs / "activate"
    return f"  . {shlex.quote(str(script))}   # in every new shell: puts ca2cl on your PATH\n"


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
