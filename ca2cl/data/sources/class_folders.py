"""Detect folders that are splits or data sets, not classes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set

_SPLITS = frozenset({"train", "training", "trn", "val", "valid", "validation", "test", "testing", "tst", "dev", "eval"})
_FILLERS = frozenset({"", "set", "split", "data", "images", "imgs", "image", "img", "tiles", "patches", "fold"})
_SHOWN = 3


def mistaken(names: Iterable[str]) -> str | None:
    """Describe class folders that look like splits or data sets; None where they look like classes.

    Folders inside a class may be slides, and every class may have the same slides: names that are numbered do not count
    as classes.

    Args:
        names: paths of the images below the source folder.
    """
    inside: defaultdict[str, set[str]] = defaultdict(set)
    flat: set[str] = set()
    for name in names:
        first, _, rest = name.partition("/")
        second, inner, _ = rest.partition("/")
        if inner:
            inside[first].add(second)
        elif rest:
            flat.add(first)
    tops = inside.keys() | flat
    splits = sorted(filter(_is_split, tops))
    if len(splits) > 1:
        return f"{_listed(splits)} look like splits, not classes"
    for top, inner_names in sorted(inside.items()):
        repeated = inner_names & (tops - {top})
        if len(repeated) > 1 and not _numbered(repeated):
            return f"{top} holds folders of the same names again ({_listed(repeated)})"
    if flat or len(inside) < 2:
        return None
    shared = set.intersection(*inside.values())
    return f"each of {_listed(tops)} holds the class folders {_listed(shared)}" if _classes(inside, shared) else None


def _classes(inside: Mapping[str, Set[str]], shared: Set[str]) -> bool:
    """True if the names that are in every folder are those of classes."""
    if len(shared) < 2 or 2 * len(shared) < max(map(len, inside.values())):
        return False
    if not _numbered(shared):
        return True
    # patients that hold the classes 0 and 1
    return len(inside) > len(shared) and _numbered(inside.keys()) and all(re.fullmatch(r"\d", name) for name in shared)


def _numbered(names: Set[str]) -> bool:
    """True if names differ only in their numbers, or all have long ones: those of slides or patients."""
    alike = {re.sub(r"\d+", "#", name) for name in names}
    return (len(alike) == 1 and "#" in alike.pop()) or all(re.search(r"\d\d", name) for name in names)


def _is_split(name: str) -> bool:
    words = set(re.split(r"[^a-z]+", name.lower()))
    return bool(words & _SPLITS) and words <= _SPLITS | _FILLERS


def _listed(names: Iterable[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:_SHOWN]) + (", ..." if len(some) > _SHOWN else "")
