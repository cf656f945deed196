"""Names and values of robustness in MLflow."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ca2cl.evaluation.centers.measure import ALL_SETS
from ca2cl.evaluation.centers.tables import with_most_labels

Content = Mapping[str, Any]
_INDICES = ("ri", "mari", "croma", "croma_tail", "center_nearer", "support")


def tracked(content: Content, names: Mapping[str, str]) -> dict[str, float]:
    """Finite numbers by name: ``robustness/encoder/ri`` of the first test set (or all together),
    ``other_tests/NAME/robustness/encoder/ri`` of another one.

    Args:
        content: of the JSON.
        names: features there, where they are called otherwise than in the table.
    """
    first = content.get("first_test")
    flat = {}
    for test, features, name, value in _numbers(content):
        where = "" if test in (first, ALL_SETS) else f"other_tests/{test}/"
        flat[f"{where}robustness/{names.get(features, features)}/{name}".replace(" ", "_")] = value
    return {name: value for name, value in flat.items() if math.isfinite(value)}


def _numbers(content: Content) -> Iterator[tuple[str, str, str, float]]:
    """Test set, features, name, value."""
    for scope in content.get("centers") or ():
        for one in scope["indices"]:
            yield from ((scope["test"], one["features"], name, one[name]) for name in _INDICES)
        yield from _identity(scope["probe"] or {}, scope["test"])
    for probe in content.get("slide_probe") or ():
        yield from _identity(probe, probe["test"])
    for drop in with_most_labels(content.get("drops") or ()):
        yield drop["test"], drop["features"], f"drop/{drop['classifier']}", drop["mean"]
    shifts = content.get("shifts") or {}
    for one in shifts.get("scores", ()):
        if one["strength"]:
            name = f"shift/{one['family']}_{one['strength']}"
            yield shifts["test"], one["features"], f"{name}/accuracy", one["accuracy"]
            yield shifts["test"], one["features"], f"{name}/drop", one["drop"]


def _identity(probe: Content, test: str) -> Iterator[tuple[str, str, str, float]]:
    for one in probe.get("scores", ()):
        name = f"{probe['what'].replace('centre', 'center')}_probe/{one['classifier']}"
        yield test, one["features"], name, one["balanced_accuracy"]
