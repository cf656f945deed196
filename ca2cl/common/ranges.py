"""Checks of settings against conditions and ranges."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from annotated_types import Ge, Gt, Interval

from ca2cl.errors import InputError


def require(holds: bool, name: str, value: object, remedy: str) -> None:
    """Refuse a setting unless ``holds``.

    Args:
        holds: the condition.
        name: dotted name of the setting.
        value: its value.
        remedy: what to use instead.

    Raises:
        InputError: it does not.
    """
    if not holds:
        raise InputError(f"{name} is {value!r}: {remedy}")


_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("{} or more", operator.ge), "gt": ("more than {}", operator.gt),
    "le": ("up to {}", operator.le), "lt": ("below {}", operator.lt),
}  # fmt: skip


def check_ranges(config: object, group: str = "", **ranges: Ge | Gt | Interval) -> None:
    """Compare settings with their ranges; of a tuple every value. None is in any range.

    Raises:
        InputError: one is outside of its range.
    """
    for name, bounds in ranges.items():
        given = getattr(config, name)
        values = given if isinstance(given, tuple) else (given,)
        limits = [(*_BOUNDS[kind], limit) for kind in _BOUNDS if (limit := getattr(bounds, kind, None)) is not None]
        inside = all(value is None or holds(value, limit) for value in values for _, holds, limit in limits)
        remedy = ", ".join(words.format(limit) for words, _, limit in limits)
        require(inside, f"{group}.{name}" if group else name, given, f"use {remedy}")
