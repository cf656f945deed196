"""Robustness of features across the centres of test sets.

Legend: N tiles of a scope (a test set, or all of them where each is a centre), C centres, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ca2cl.common.console.progress import ProgressBar
from ca2cl.errors import InputError
from ca2cl.evaluation.centers.assignment import SET, TileSet, centers_of
from ca2cl.evaluation.centers.identity import Classify, Task, center_task, scores, slide_task
from ca2cl.evaluation.centers.indices import K_CANDIDATES, M, indices
from ca2cl.evaluation.datasets import ProbeSet
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.splits import stratified_sample
from ca2cl.evaluation.statistics import Units

IntArray = npt.NDArray[np.int64]
MOST_TILES = 20_000
"""Tiles that the indices are of: their time grows with the square."""
ALL_SETS = "all test sets"
Assigned = dict[str, dict[int, str]]
"""Name of a set → sample number → centre."""


@dataclass(frozen=True)
class Scope:
    """Tiles that are looked at together."""

    name: str
    features: Mapping[str, npt.NDArray[np.float32]]
    labels_N: IntArray
    groups: list[str]
    """Slide or patient of every tile; a tile without one is a group of its own."""
    slides_known: bool
    center_N: IntArray
    """-1 where a tile has none."""
    names: list[str]
    """Of the centres."""

    @property
    def slides(self) -> list[str] | None:
        """Groups, if any is a slide or patient."""
        return self.groups if self.slides_known else None


def assign(setting: str, tests: Sequence[TileSet], train: TileSet | None) -> Assigned:
    """The centre of every labelled tile of every set, before any tile is read.

    Raises:
        InputError: the setting cannot be used, or tells no two centres of a test set apart.
    """
    found = {
        tiles.name: {
            int(sample): center
            for sample, center in zip(tiles.samples, centers_of(setting, tiles), strict=True)
            if center is not None
        }
        for tiles in (*tests, *([train] if train is not None and setting != SET else []))
    }
    together = [set().union(*(found[t.name].values() for t in tests))] if setting == SET else []
    counts = together or [set(found[tiles.name].values()) for tiles in tests]
    if max(map(len, counts)) < 2:
        more = "give several test sets" if setting == SET else f"or use {SET} to compare test sets"
        raise InputError(
            f"center is {setting!r}: finds one centre, {next(iter(counts[0]), 'none')}, in the test tiles; give a "
            f"setting that tells two apart, {more}"
        )
    return found


def groups_of(data: ProbeSet) -> tuple[list[str], bool]:
    """Slide or patient of every tile, or else its key; and whether any tile has one."""
    groups = data.index.groups()
    keys = keys_of(data)
    named = [groups[sample] for sample in data.tiles.samples_N.tolist()]
    known = any(group is not None for group in named)
    return [f"slide {g}" if g is not None else f"tile {key}" for g, key in zip(named, keys, strict=True)], known


def keys_of(data: ProbeSet) -> list[str]:
    """Key of every tile."""
    keys = [str(key) for shard in data.index for key in shard.key]
    return [keys[sample] for sample in data.tiles.samples_N.tolist()]


def scopes_of(tests: Mapping[str, ProbeSet], assigned: Assigned | None, together: bool) -> list[Scope]:
    """A scope for each test set, or one of all of them.

    Args:
        tests: with their features.
        assigned: centre of their tiles; None where centres play no part.
        together: whether all sets are one scope.
    """
    held = [list(tests)] if together else [[name] for name in tests]
    scopes = []
    for sets in held:
        groups = [groups_of(tests[name]) for name in sets]
        of_tile = [
            (assigned or {}).get(name, {}).get(sample)
            for name in sets
            for sample in tests[name].tiles.samples_N.tolist()
        ]
        names = sorted({center for center in of_tile if center is not None})
        number = {center: position for position, center in enumerate(names)}
        tiles = [tests[name].tiles for name in sets]
        scopes.append(
            Scope(
                ALL_SETS if together else sets[0],
                {key: np.concatenate([one.values[key] for one in tiles]) for key in tiles[0].values},
                np.concatenate([one.labels_N for one in tiles]),
                [group for found, _ in groups for group in found],
                any(known for _, known in groups),
                np.array([number.get(center, -1) if center is not None else -1 for center in of_tile], np.int64),
                names,
            )
        )
    return scopes


def center_numbers(scope: Scope, classifiers: Mapping[str, Classify]) -> dict[str, Any]:
    """Everything about the centres of a scope, for JSON; ``indices`` is empty where it has a single centre.

    Args:
        scope: the tiles.
        classifiers: of the probe of the centre.
    """
    known = np.flatnonzero(scope.center_N >= 0)
    found: dict[str, Any] = {
        "test": scope.name,
        "tiles": len(known),
        "without_center": len(scope.center_N) - len(known),
        "centers": {
            name: {"tiles": int(of_N.sum()), "units": len({scope.groups[row] for row in np.flatnonzero(of_N)})}
            for name, of_N in ((name, scope.center_N == number) for number, name in enumerate(scope.names))
        },
        "indices": [],
        "probe": None,
    }
    if len(scope.names) < 2:
        return found
    cell_N = scope.center_N[known] * (int(scope.labels_N.max()) + 1) + scope.labels_N[known]
    rows = known[stratified_sample(cell_N, MOST_TILES, 0)]
    if len(rows) <= max(K_CANDIDATES):
        return found
    group_N = np.unique(np.asarray(scope.groups, str)[rows], return_inverse=True)[1].astype(np.int64)
    units = Units(group_N, scope.slides_known)
    found |= {
        "scored_tiles": len(rows),
        "unit": units.name,
        "units": units.count,
        "k_candidates": list(K_CANDIDATES),
        "m": M,
        "indices": _indices(scope, rows, units),
    }
    task = center_task(scope.center_N, scope.names, scope.slides)
    return found | {"probe": identity_numbers(scope, task, classifiers)}


def _indices(scope: Scope, rows: IntArray, units: Units) -> list[dict[str, Any]]:
    labels_N, center_N = scope.labels_N[rows], scope.center_N[rows]
    features = ProgressBar(scope.features.items(), desc="robustness indices", unit="features")
    return [
        {"features": name, **indices(values_ND[rows], labels_N, center_N, units.unit_N, units=units).as_dict()}
        for name, values_ND in features
    ]


def slide_numbers(scope: Scope, classifiers: Mapping[str, Classify]) -> dict[str, Any]:
    """The probe of the slide, for JSON; ``scores`` is missing where fewer than two slides have tiles enough."""
    task = slide_task(scope.slides)
    return {"test": scope.name, **(identity_numbers(scope, task, classifiers) or {})}


def identity_numbers(scope: Scope, task: Task | None, classifiers: Mapping[str, Classify]) -> dict[str, Any] | None:
    """The scores of a probe of the centre or the slide, for JSON; None without a task."""
    if task is None:
        return None
    features = ProgressBar(scope.features.items(), desc=f"probe of the {task.what}", unit="features")
    found = scores(task, dict(features), scope.labels_N, classifiers)
    return {
        "what": task.what,
        "targets": task.names,
        "tiles": len(task.rows),
        "chance": task.chance,
        "unit": task.units.name,
        "units": task.units.count,
        "notes": task.notes,
        "scores": [asdict(score) for score in found],
    }


def accuracy_by_center(rows: Sequence[Row], scope: Scope, seen: Mapping[str, int]) -> list[dict[str, Any]]:
    """Accuracy of the classifiers with the most labels in each centre of one test set, for JSON.

    Args:
        rows: of the table.
        scope: one test set.
        seen: training tiles of each centre.
    """
    most = max((row.labelled for row in rows), default=0)
    return [
        {
            "features": row.features,
            "classifier": row.classifier,
            "budget": row.budget,
            "accuracy": {
                name: float(row.right_SN[:, scope.center_N == number].mean()) for number, name in enumerate(scope.names)
            },
            "training_tiles": {name: seen.get(name, 0) for name in scope.names},
        }
        for row in rows
        if row.test == scope.name and row.labelled == most
    ]
