"""Packages, devices, host and commit of a run."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import ca2cl
from ca2cl.common.redact import redact

_FIELD = re.compile(r"^(Name|Version):[ \t]*(\S+)", re.MULTILINE)


def environment() -> dict[str, Any]:
    """Versions, devices, host and commit, ready for JSON."""
    import torch  # seconds that the help of a verb need not take

    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "ca2cl": ca2cl.__version__,
        "commit": git_commit(),
        "command": [redact(argument) for argument in sys.argv],
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE") or 1),
        "device": "cuda" if on_gpu else "cpu",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
    }


@cache
def requirements() -> str:
    """Every installed distribution as ``name==version`` lines, what ``pip freeze`` would say."""
    # parsing the files whole, as importlib does, takes 20 times as long
    texts = (dist.read_text("METADATA") or dist.read_text("PKG-INFO") or "" for dist in metadata.distributions())
    heads = (text.partition("\n\n")[0] for text in texts)
    fields = (dict(_FIELD.findall(head)) for head in heads)
    found = {one["Name"].lower(): one["Version"] for one in fields if len(one) == 2}
    return "".join(f"{name}=={version}\n" for name, version in sorted(found.items()))


@cache
def git_commit() -> str | None:
    """Commit of the checkout that this package runs from, ``+changed`` if it has edits; None outside one."""
    here = Path(__file__).resolve().parent
    commit = _git(here, "rev-parse", "HEAD")
    # An installed copy may lie inside somebody else's checkout: only one that tracks this very file counts.
    if commit is None or _git(here, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return f"{commit}+changed" if _git(here, "status", "--porcelain", "--untracked-files=no", "..") else commit


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
