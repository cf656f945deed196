"""What the command line of commit f1aef52 takes and answers, as JSON: ``PYTHONPATH=OLD python facts.py`` (make.py)."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import ca2cl
from ca2cl import cli

ROOT = Path(ca2cl.__file__).parents[1]
NEEDED = {
    "shard": ("in", "out"),
    "probe": ("--encoder", "random", "--train", "a", "--test", "b"),
    "finetune": ("--encoder", "random", "--train", "a", "--test", "b", "--output_dir", "c"),
    "embed": ("--encoder", "random", "a", "b.parquet"),
    "export": ("--encoder", "random", "--to", "onnx", "a.onnx"),
    "detect": ("--encoder", "random", "--dataset", "glas", "--data", "a", "--output_dir", "b"),
    "detect prepare": ("glas", "a", "b"),
    "detect predict": ("a", "b", "c"),
    "report": ("a", "b.html"),
    "encoders show": ("1",),
    "encoders compare": ("1", "2"),
    "encoders promote": ("1",),
    "encoders import": ("random",),
    "reproduce nct": ("--encoder", "random", "--data", "a"),
    "sync": ("a",),
}
"""The shortest command of each verb that takes more than its name."""
ENDS = (
    "", "--help", "--version", "nonsense", "encoders", "encoders --help", "encoders nonsense", "detect", "launch",
    "pretrain", "pretrain --print_config", "pretrain --help", "pretrain --run.sted 3", "pretrain --recipe nothing",
    "pretrain --config missing.yaml", "pretrain --run.batch_size 33", "pretrain --run.batch_size many",
    "pretrain --run.precision fp8", "pretrain --recipe smoke --data.shards nowhere --run.output_dir out",
    "probe", "probe --encoder nowhere --train nowhere --test nowhere",
    "probe --encoder random --train a --test b --seeds 0",
    "finetune --encoder random --train nowhere --test nowhere --output_dir out",
    "embed --encoder random nowhere out.parquet", "embed --encoder random nowhere out.csv",
    "export --encoder nowhere --to onnx out.onnx", "export --encoder random --to nothing out.pth",
    "report nowhere out.html", "report nowhere out.pdf", "sync nowhere", "shard nowhere out",
    "doctor --views nowhere out.png",
    "detect prepare glas nowhere out", "detect prepare nothing nowhere out", "detect predict nowhere nowhere out",
    "detect --encoder random --dataset glas --data nowhere --output_dir out", "quickstart here --steps 0",
    "encoders show 1", "encoders compare 1 2", "encoders promote 1", "encoders import nowhere", "encoders list",
    "reproduce nct --encoder random --data nowhere --output_dir out",
)  # fmt: skip


def flags(verb: str) -> dict[str, Any]:
    """Every setting of the verb's shortest command, by its dotted name."""
    return dict(_flat(dataclasses.asdict(cli.parse(verb, list(NEEDED.get(verb, ()))))))


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def documented() -> list[list[str]]:
    """The commands of README and docs, as words after ``ca2cl``."""
    found = []
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = re.sub(r" *\\\n *", " ", document.read_text(encoding="utf-8"))
        for line in re.findall(r"^    (?:accelerate launch .* -m )?ca2cl (.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if "..." not in words and words[0] != "launch":
                found.append(words)
    return found


def ending(command: str) -> int:
    """The exit code of a command."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            return cli.main(shlex.split(command))
        except SystemExit as end:  # accelerate's own parser, of `launch`
            return int(str(end.code))


def main() -> None:
    """Print everything."""
    verbs = [name for name, verb in cli.VERBS.items() if not verb.raw]
    recipes = {}
    for path in sorted((ROOT / "ca2cl" / "recipes").glob("*.yaml")):
        settings = dict(_flat(dataclasses.asdict(cli.parse("pretrain", ["--config", str(path)]))))
        recipes[path.stem] = {"text": path.read_text(encoding="utf-8"), "settings": settings}
    facts = {
        "mlflow": metadata.version("mlflow"),
        "needed": NEEDED,
        "settings": {verb: flags(verb) for verb in verbs},
        "recipes": recipes,
        "documented": documented(),
        "ends": {command: ending(command) for command in ENDS},
    }
    sys.stdout.write(json.dumps(facts))


if __name__ == "__main__":
    main()
