"""What files from elsewhere are held against before they are believed: JSON, numbers and names in it.

Nothing here, or in any reader of this package, runs what it reads: see README, "What is never run".
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ca2cl.common.redact import redact

NONFINITE = "nonfinite"
"""Field of a JSON line that names its values which are not finite."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: not JSON, not UTF-8, or nested deeper than Python reads.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_whole(value: object, low: int = 0, high: int = 2**63 - 1) -> bool:
    """Whether ``value`` is a whole number from ``low`` to ``high``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite number that a float holds; True and False are none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023
    return isinstance(value, float) and math.isfinite(value)


def is_text(value: object) -> bool:
    """Whether ``value`` is text that can be written down as UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True


def is_file_name(value: object) -> bool:
    """Whether ``value`` is a relative path that stays in its folder, as far as its words tell."""
    if not isinstance(value, str) or not value or not is_text(value) or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts


def lies_in(folder: Path, path: Path) -> bool:
    """Whether ``path`` is ``folder`` or lies in it once all links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def load_tensors(path: str | Path) -> Any:
    """What ``torch.save`` wrote into a file: tensors, and containers of them and of plain values.

    Raises:
        ValueError: anything else is in it, or it is damaged; says which.
    """
    import torch

    try:
        with warnings.catch_warnings():  # torch's ask for an issue where a pickle is of another protocol
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader of plain tensors takes any bytes for instructions until one fails, in whatever way.
    except Exception as error:  # noqa: BLE001
        raise ValueError(why_not_tensors(error)) from None


def why_not_tensors(error: Exception) -> str:
    """Why torch's reader of plain tensors, or a download, failed: in a line, and without torch's advice to set
    ``weights_only=False``, which runs whatever is in the file."""
    text = " ".join(str(error).split())
    if wanted := re.search(r"GLOBAL (\w[\w.]*)", text):
        return f"a pickled {wanted[1]} is in it, and nothing is unpickled"
    if "weights_only" in text.lower():
        return "something else is in it, and nothing is unpickled"
    return text[:200] or type(error).__name__


def json_line(record: Mapping[str, Any]) -> bytes:
    """A record as one line of strict JSON (RFC 8259: no NaN, no infinities)."""
    nonfinite: dict[str, str] = {}
    clean = {str(name): _clean(value, str(name), nonfinite) for name, value in record.items()}
    if nonfinite:
        clean[NONFINITE] = nonfinite
    return json.dumps(clean, allow_nan=False, ensure_ascii=False).encode() + b"\n"


def _clean(value: Any, name: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, bool) or value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        nonfinite[name] = str(value)
        return None
    if isinstance(value, Mapping):
        return {str(key): _clean(inner, f"{name}.{key}", nonfinite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner, f"{name}.{place}", nonfinite) for place, inner in enumerate(value)]
    if hasattr(value, "item"):  # a NumPy scalar or a tensor of one element
        return _clean(value.item(), name, nonfinite)
    return redact(str(value)).encode("utf-8", "replace").decode()
