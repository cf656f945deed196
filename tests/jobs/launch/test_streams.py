"""Standard streams that are closed, full, left by their reader or of a narrow encoding: no job ends by showing."""

from __future__ import annotations

import ast
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ca2cl
from ca2cl.cli.streams import _shielded, check_output, shield_streams
from ca2cl.errors import InputError
from tests.support.jobs import ROOT

CA2CL = f"{sys.executable} -m ca2cl"
CONFIG = f"{CA2CL} pretrain --print_config"
PRINT = "from ca2cl.cli.streams import shield_streams; shield_streams(); print('\\xb1 \\u0416')"


def shell(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Bash's outcome; ``$?`` is that of the first command of a pipe."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    script = f"set -o pipefail; {script}"
    return subprocess.run(["bash", "-c", script], cwd=folder, env=env, capture_output=True, timeout=300, check=False)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_ends_nothing(unbuffered: str, tmp_path: Path) -> None:
    for command in (f"{CA2CL} --help | true", f"{CONFIG} | head -1 > /dev/null"):
        done = shell(command, tmp_path, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (0, b"")
    done = shell(f"{CA2CL} nonsense 2>&1 | true", tmp_path)
    assert (done.returncode, done.stderr) == (2, b"")


def test_closed_streams_lead_nowhere_and_are_nobodys_file(tmp_path: Path) -> None:
    done = shell(f"{CONFIG} >&- <&-", tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    done = shell(f"{CA2CL} nonsense >&- 2>&- <&-", tmp_path)
    assert done.returncode == 2
    script = (
        "import sys; from ca2cl.cli.streams import shield_streams; shield_streams(); f = open('x', 'w'); print('lost')"
    )
    done = shell(f'{sys.executable} -c "{script}" >&- 2>&- <&-', tmp_path)
    assert done.returncode == 0 and (tmp_path / "x").read_bytes() == b""


def test_a_full_stdout_is_one_line(tmp_path: Path) -> None:
    done = shell(f"{CONFIG} > /dev/full", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("ca2cl: error: stdout cannot be written (No space left on device)")
    done = shell(f"{CA2CL} nonsense > /dev/full", tmp_path)  # one line, and about what came first
    assert done.returncode == 2 and b"no verb" in done.stderr and b"stdout" not in done.stderr
    assert shell(f"{CONFIG} > /dev/full 2> /dev/full", tmp_path).returncode == 2


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_an_encoding_lacks_is_escaped(environment: dict[str, str], tmp_path: Path) -> None:
    done = shell(f'{sys.executable} -c "{PRINT}"', tmp_path, **environment)
    assert (done.returncode, done.stderr) == (0, b"") and rb"\u0416" in done.stdout, done


def test_a_non_blocking_pipe_is_waited_for() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    got: list[bytes] = []

    def read() -> None:
        time.sleep(0.2)
        while part := os.read(reader, 65536):
            got.append(part)

    thread = threading.Thread(target=read)
    thread.start()
    stream = _shielded(None, writer)
    stream.write("x" * 1_000_000)
    stream.flush()
    os.close(writer)
    thread.join()
    os.close(reader)
    assert sum(map(len, got)) == 1_000_000


def test_streams_that_a_caller_has_put_there_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = io.StringIO()
    monkeypatch.setattr(sys, "stdout", mine)
    shield_streams()
    assert sys.stdout is mine
    check_output()
    full = os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(sys, "stdout", _shielded(None, full))
    sys.stdout.write("x")
    with pytest.raises(InputError, match="No space left"):
        check_output()
    os.close(full)


def test_no_text_file_is_read_or_written_in_the_locales_encoding() -> None:
    """ruff's PLW1514 sees the files whose type it can tell; these are the rest."""
    for path in sorted(Path(ca2cl.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            named = {one.arg for one in node.keywords}
            positional = {"read_text": 1, "write_text": 2}.get(node.func.attr, 0)  # (the encoding's place)
            if node.func.attr in ("read_text", "write_text"):
                assert "encoding" in named or len(node.args) >= positional, f"{path}:{node.lineno}"
            if "text" in named or "universal_newlines" in named:
                assert "encoding" in named, f"{path}:{node.lineno}"
