"""``--help`` prints text, and imports nothing that takes seconds."""

import subprocess
import sys

import pytest

LIGHT = ["", "pretrain", "shard", "probe", "finetune", "embed", "export", "report", "reproduce nct", "doctor", "sync"]
SCRIPT = """
import sys
from contextlib import suppress
from ca2cl.cli.entry import main
with suppress(SystemExit):
    main()
frameworks = {"torch", "torchvision", "accelerate", "mlflow", "sklearn", "scipy", "pandas", "matplotlib"}
heavy = frameworks & sys.modules.keys()
sys.exit(f"imported {sorted(heavy)}" if heavy else 0)
"""


@pytest.mark.parametrize("verb", LIGHT)
def test_help_imports_no_framework(verb: str) -> None:
    command = [sys.executable, "-c", SCRIPT, *verb.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() or "ca2cl" in done.stdout
