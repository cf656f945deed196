"""``ca2cl quickstart``: the whole pipeline on synthetic tissue.

It runs the commands that a user would type, and prints each.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from annotated_types import Ge

from ca2cl.common.console.summary import PART
from ca2cl.common.ranges import check_ranges
from ca2cl.common.records import parse_json
from ca2cl.config import TrackingConfig
from ca2cl.errors import InputError
from ca2cl.store.databases import sqlite_uri
from ca2cl.store.locate import CONFIG_VARIABLE

POSITIONAL = ("folder",)
_TILE_SIZE = 64
_TEST_SEED = 1


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Draw synthetic tissue, shard it, draw its views, train an encoder, register it and probe it.

    Every command is printed before it runs, so that you can repeat it on your own tiles. If it is stopped, run it again
    in the same folder to resume.
    """

    folder: str = "ca2cl-quickstart"
    """Output folder: tiles, shards, run, MLflow store, figures."""
    tiles_per_class: int = 100
    """Training tiles for each of nine classes; half as many are drawn for testing."""
    steps: int = 80
    """Optimizer steps of pre-training."""

    def __post_init__(self) -> None:
        check_ranges(self, tiles_per_class=Ge(10), steps=Ge(1))


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
    run_id = parse_json((folder / "run" / "run.json").read_text(encoding="utf-8"))["run_id"]
    code = _start(
        ["ca2cl", "probe", "--encoder", run_id, "--train", "shards/train", "--test", "shards/test",
         "--labels", "0.1", "1.0", "--imagenet", "false", "--output", "probe.json"], folder,
    )  # fmt: skip
    if code == 0:
        sys.stdout.write(_summary(folder, time.monotonic() - started))
    return code


def _draw(folder: Path, tiles_per_class: int) -> None:
    from ca2cl.data.synthetic.tissue import write_tissue

    for name, count, seed in (("train", tiles_per_class, 0), ("test", tiles_per_class // 2, _TEST_SEED)):
        root = folder / "tissue" / name
        if root.exists():
            _say(f"{root}: there already, kept as it is")
            continue
        _say(f"drawing {count} {name} tiles a class into {root}")
        write_tissue(root, count, size=_TILE_SIZE, seed=seed)


def commands(config: QuickstartConfig) -> list[list[str]]:
    """Commands up to the trained encoder, as a user would type them in the folder."""
    return [
        ["ca2cl", "shard", "tissue/train", "shards/train"],
        ["ca2cl", "shard", "tissue/test", "shards/test"],
        ["ca2cl", "doctor", "--views", "shards/train", "views.png", "--recipe", "crop", "--image_size", "48"],
        ["ca2cl", "pretrain", "--recipe", "smoke", "--data.shards", "shards/train",
         "--data.image_size", "48", "--optim.name", "adamw", "--optim.lr", "0.001",
         "--run.steps", str(config.steps), "--run.checkpoint_every", "40", "--run.output_dir", "run"],
    ]  # fmt: skip


def _start(command: Sequence[str], folder: Path) -> int:
    """Run a command in ``folder``, whether or not the environment's programs are on the path."""
    _say("\n$ " + shlex.join(command))
    # made-up tissue needs no network, so nothing asks for one
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", CONFIG_VARIABLE: "", PART: "1"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    arguments = [sys.executable, "-m", *command]
    return subprocess.run(arguments, cwd=folder, env=environment, check=False).returncode


def _summary(folder: Path, seconds: float) -> str:
    figures = folder / "run" / "figures"
    store = (folder / TrackingConfig().root).resolve() / "mlflow.db"
    return (
        f"\nDone in {seconds:.0f} s. What there is to see:\n"
        f"  {folder / 'views.png'}: tiles beside the views that training saw\n"
        f"  {figures}: the curves, and what the encoder groups together\n"
        f"  {folder / 'probe-confusion.png'}: which classes the probe takes for which\n"
        f"  {sys.executable} -m mlflow ui --backend-store-uri {shlex.quote(sqlite_uri(store))}\n"
    )


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
