"""Validation of untrusted input files: JSON records, numbers and names.

Nothing here, or in any reader of this package, runs what it reads: see SECURITY.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast

from annotated_types import Interval

from ca2cl.common.redact import redact
from ca2cl.errors import InputError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

NONFINITE = "nonfinite"
"""Field of a JSON line that names its values which are not finite."""
Count = Annotated[int, Interval(ge=0, lt=2**63)]
"""Type of a record's field: a whole number that 64 bits hold. True and False are none."""
Number = float | Annotated[int, Interval(gt=-(2**1023), lt=2**1023)]
"""Type of a record's field: a number that a float holds, kept as it is written."""
T = TypeVar("T")


class DamagedRecord(InputError):
    """A file that is not what its reader needs."""


def read_record(path: Path, model: type[T], remedy: str, *, newest: int | None = None, absent: str = "") -> T:
    """The record in a JSON file.

    Args:
        path: the file.
        model, remedy, newest: as for ``parse_record``.
        absent: the message where there is no file.

    Raises:
        DamagedRecord: it is missing, cannot be read, or is not such a record.
        InputError: it is of a newer schema.
    """
    try:
        text = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedRecord(f"{path}: {absent or f'no such file; {remedy}'}") from None
    except OSError as error:
        raise DamagedRecord(f"{path}: cannot be read ({error.strerror}); {remedy}") from None
    return parse_record(text, model, path, remedy, newest=newest)


def read_fields(path: Path, needed: Sequence[str], remedy: str) -> dict[str, Any]:
    """The object in a JSON file, which has at least the fields ``needed``; the errors of ``read_record``."""
    fields = read_record(path, dict[str, Any], remedy)
    if lacking := [name for name in needed if name not in fields]:
        raise DamagedRecord(f"{path}: damaged, lacks {', '.join(lacking)}; {remedy}")
    return fields


def parse_record(text: str | bytes, model: type[T], where: object, remedy: str, *, newest: int | None = None) -> T:
    """A JSON text as an instance of ``model``.

    Nothing is converted: "1" and True are no numbers.

    Args:
        model: a dataclass, or another type that pydantic knows. A dataclass may have a ``__pydantic_config__``, and a
            ``__post_init__`` that raises ValueError.
        where: the file, for messages.
        remedy: the end of a message.
        newest: the newest ``schema_version`` that is known; None where there are no versions.

    Raises:
        DamagedRecord: it is not such a record; names the field and its value.
        InputError: it is of a newer schema.
    """
    from pydantic import ValidationError

    try:
        raw = parse_json(text)
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if newest is not None and is_whole(version, newest + 1):
            raise InputError(f"{where}: schema {version} is newer than this version's {newest}; upgrade ca2cl")
        record: T = _adapter(cast(Any, model)).validate_json(text, strict=True)
        return record
    except ValidationError as error:
        raise DamagedRecord(f"{where}: damaged, {_fault(error, raw)}; {remedy}") from None
    except InputError:
        raise
    except ValueError as error:
        raise DamagedRecord(f"{where}: damaged, not JSON ({error}); {remedy}") from None


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(model)


def _fault(error: ValidationError, raw: Any) -> str:
    """The fault of a record: its missing fields, or the first field with a wrong value."""
    faults = error.errors(include_url=False, include_context=False)
    missing = [str(fault["loc"][0]) for fault in faults if fault["type"] == "missing" and len(fault["loc"]) == 1]
    if missing:
        return f"lacks {', '.join(missing)}"
    reason = faults[0]["msg"].removeprefix("Input ").removeprefix("Value error, ")
    if not faults[0]["loc"]:  # the record as a whole
        return reason
    field = faults[0]["loc"][0]
    return f"{field} is {raw[field]!r:.100} ({reason})"


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
    """True if ``value`` is a whole number from ``low`` to ``high``; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_number(value: object) -> bool:
    """True if ``value`` is a finite number that a float holds; True and False are none."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**1023
    return isinstance(value, float) and math.isfinite(value)


def is_text(value: object) -> bool:
    """True if ``value`` is text that can be written down as UTF-8."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can spell
        return False
    return True


def is_file_name(value: object) -> bool:
    """True if ``value`` is a relative path that stays in its folder, links aside."""
    if not isinstance(value, str) or not value or not is_text(value) or "\0" in value:
        return False
    path = PurePosixPath(value)
    return not path.is_absolute() and bool(path.parts) and ".." not in path.parts


def lies_in(folder: Path, path: Path) -> bool:
    """True if ``path`` is ``folder`` or lies in it once all links are followed."""
    return path.resolve().is_relative_to(folder.resolve())


def load_tensors(path: str | Path) -> Any:
    """Read a file of ``torch.save``: tensors, and containers of them and of plain values.

    ``argparse.Namespace`` is among the containers: DINO and others keep their settings beside the weights, and it only
    has attributes set.

    Raises:
        ValueError: anything else is in it, or it is damaged; says which.
    """
    import torch

    try:
        with (
            torch.serialization.safe_globals([argparse.Namespace]),
            warnings.catch_warnings(),
        ):  # torch's ask for an issue where a pickle is of another protocol
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader of plain tensors takes any bytes for instructions until one fails, in whatever way.
    except Exception as error:  # noqa: BLE001
        raise ValueError(why_not_tensors(error)) from None


def why_not_tensors(error: Exception) -> str:
    """Error of torch's reader of plain tensors, or of a download, in one line and without torch's advice to set
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
