"""Damaged files: what chance makes of bytes, and what malice makes of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

DEEP, _HUGE = "@deep@", "@huge@"
_RAW = {DEEP: "[" * 50_000 + "]" * 50_000, _HUGE: "9" * 5000}
# what no field is meant to hold, or what some field must not
ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 99, 10**12, 2**63, 10**30, -(10**18), 0.5, 1e308, math.nan, math.inf, -math.inf,
    "", "x", "0", "../x", "/etc/passwd", "a\0b", "\ud800", "x" * 3000, "é", [], [[]], [1, 2], [None], {}, {"": None},
    {"x": {}}, [10**12, 10**12], DEEP, _HUGE,
)  # fmt: skip
_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.sampled_from(ODD) | st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def raw(value: Any) -> bytes:
    """JSON as an attacker may write it: NaN, half surrogate pairs, and what Python would not nest or count so far."""
    text = json.dumps(value)
    for name, written in _RAW.items():
        text = text.replace(json.dumps(name), written)
    return text.encode()


@st.composite
def damaged_bytes(draw: Callable[..., Any], valid: bytes) -> bytes:
    """``valid`` with one to four bytes or stretches flipped, cut out, put in or repeated, or cut off."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        until = min(len(data), at + draw(st.sampled_from([1, 2, 8, 100, 10**6])))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "write", "truncate"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:until]
        elif kind == "repeat":
            data[at:at] = data[at:until]
        elif kind == "truncate":
            del data[at:]
        else:
            new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b"\n", b'"', b"[", b"\xff\xff"]))
            data[at : at + (len(new) if kind == "write" else 0)] = new
    return bytes(data)


@st.composite
def damaged_json(draw: Callable[..., Any], valid: Any) -> Any:
    """``valid`` with one to three of its values replaced, left out, repeated or wrapped, at any depth."""
    holder = [json.loads(json.dumps(valid))]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = _place(draw, holder)
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "wrap", "add"]))
        if kind == "replace":
            parent[key] = deepcopy(draw(VALUES))
        elif kind == "wrap":
            parent[key] = [parent[key]] if draw(st.booleans()) else {"x": parent[key]}
        elif kind == "add" and isinstance(parent, dict):
            parent[draw(st.text(max_size=8))] = deepcopy(draw(VALUES))
        elif parent is not holder and kind == "drop":
            del parent[key]
        elif isinstance(parent, list) and parent is not holder:
            parent.insert(key, deepcopy(parent[key]))
    return holder[0]


def _place(draw: Callable[..., Any], holder: list[Any]) -> tuple[Any, Any]:
    """A container and a key of it, reached by a walk that may end at any depth."""
    parent: Any = holder
    key: Any = 0
    while isinstance(parent[key], (dict, list)) and parent[key] and draw(st.integers(0, 5)):
        parent = parent[key]
        key = (
            draw(st.sampled_from(sorted(parent))) if isinstance(parent, dict) else draw(st.integers(0, len(parent) - 1))
        )
    return parent, key
