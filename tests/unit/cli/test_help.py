"""``--help`` prints text, and imports nothing that takes seconds."""

import json
import subprocess
import sys

import pytest

from ca2cl.cli.verbs import VERBS

FORMS = [[], *(name.split() for name in VERBS), ["encoders"]]
SCRIPT = """
import contextlib, io, json, sys
from ca2cl.cli.entry import main
frameworks = {
    "torch", "torchvision", "accelerate", "mlflow", "sqlalchemy", "sklearn", "scipy", "pandas", "matplotlib",
    "datasets", "pyarrow", "numba",
}
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as text:
        try:
            code = main([*words, "--help"])
        except SystemExit as end:
            code = end.code
    heavy = sorted(frameworks & sys.modules.keys())
    print(json.dumps([code or 0, text.getvalue(), heavy]), flush=True)
    for name in list(sys.modules):  # what one verb imports is not in the next one's way
        if name.partition(".")[0] in frameworks:
            del sys.modules[name]
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[int, str, list[str]]]:
    """Exit code, text, and frameworks imported of every verb's help, by its name; all in one process."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(FORMS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = map(json.loads, done.stdout.splitlines())
    return {" ".join(words): result for words, result in zip(FORMS, results, strict=True)}


@pytest.mark.parametrize("verb", [" ".join(words) for words in FORMS])
def test_help_imports_no_framework(helps: dict[str, tuple[int, str, list[str]]], verb: str) -> None:
    code, text, heavy = helps[verb]
    assert (code, heavy) == (0, [])
    assert text.startswith("usage: ca2cl")
    assert all(word in text for word in verb.split())
