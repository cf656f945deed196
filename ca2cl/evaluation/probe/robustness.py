"""Measure a probe's robustness to centres, shifts and other test sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.evaluation.centers.assignment import SET, TileSet
from ca2cl.evaluation.centers.drop import TestTiles, drops
from ca2cl.evaluation.centers.identity import Classify
from ca2cl.evaluation.centers.measure import (
    Assigned,
    accuracy_by_center,
    assign,
    center_numbers,
    groups_of,
    keys_of,
    scopes_of,
    slide_numbers,
)
from ca2cl.evaluation.centers.shift_scores import shift_scores
from ca2cl.evaluation.centers.shifts import SHIFTS
from ca2cl.evaluation.datasets import ProbeSet, name_sets
from ca2cl.evaluation.probe.classifiers import logistic_regression, nearest_neighbours
from ca2cl.evaluation.probe.config import ProbeConfig
from ca2cl.evaluation.probe.encoders import Contenders
from ca2cl.evaluation.probe.scoring import KNN, LINEAR, Heads
from ca2cl.evaluation.result import Row
from ca2cl.evaluation.statistics import Units

TRAIN = "training tiles"


@dataclass(frozen=True)
class Probed:
    """What a probe has when its classifiers are scored."""

    train: ProbeSet
    tests: Mapping[str, ProbeSet]
    rows: Sequence[Row]
    heads: Heads
    units: Mapping[str, Units]


def assign_centers(config: ProbeConfig, indexes: Sequence[ShardIndex]) -> Assigned | None:
    """The centre of every labelled tile; None without ``center``.

    Args:
        config: of the probe.
        indexes: of the training and test sets.

    Raises:
        InputError: ``center`` cannot be used with these sets.
    """
    if config.center is None:
        return None
    names = [TRAIN, *name_sets(config.tests)]
    sets = [
        TileSet(name, root, index, np.flatnonzero(index.labels() >= 0).tolist())
        for name, root, index in zip(names, (config.train, *config.tests), indexes, strict=True)
    ]
    return assign(config.center, sets[1:], sets[0])


def measure(
    config: ProbeConfig, probed: Probed, assigned: Assigned | None, contenders: Contenders, device: torch.device
) -> dict[str, Any]:
    """Everything that was asked for, for JSON; empty where nothing was.

    Args:
        config: of the probe.
        probed: its sets and scores.
        assigned: centre of every tile (``assign_centers``).
        contenders: the encoders.
        device: where they are.
    """
    tests = probed.tests
    classifiers = _classifiers(config)
    found: dict[str, Any] = {}
    if assigned is not None:
        scopes = scopes_of(tests, assigned, config.center == SET)
        seen = Counter(assigned.get(TRAIN, {}).values())
        found["center"] = config.center
        found["centers"] = [center_numbers(scope, classifiers) for scope in scopes]
        for scope, numbers in zip(scopes, found["centers"], strict=True):
            numbers["training_tiles"] = dict(seen)
            if scope.name in tests and len(scope.names) > 1:
                numbers["accuracy"] = accuracy_by_center(probed.rows, scope, seen)
    if config.slide_probe:
        found["slide_probe"] = [slide_numbers(scope, classifiers) for scope in scopes_of(tests, None, False)]
    if len(tests) > 1:
        tiles = {name: _test_tiles(test) for name, test in tests.items()}
        found["drops"] = [drop.as_dict() for drop in drops(probed.rows, tiles)]
    if config.shifts:
        found["shifts"] = _shifts(config, probed, contenders, device)
    return {"first_test": next(iter(tests)), **found} if found else {}


def _classifiers(config: ProbeConfig) -> dict[str, Classify]:
    return {
        LINEAR: lambda fit, targets, held: logistic_regression(fit, targets, held, seed=0, strength=1.0).probabilities,
        KNN: lambda fit, targets, held: nearest_neighbours(fit, targets, held, k=config.knn).probabilities,
    }


def _test_tiles(test: ProbeSet) -> TestTiles:
    groups, known = groups_of(test)
    return TestTiles(keys_of(test), test.tiles.labels_N.tolist(), groups if known else None)


def _shifts(config: ProbeConfig, probed: Probed, contenders: Contenders, device: torch.device) -> dict[str, Any]:
    """Scores of the first test set's tiles, shifted, by the first draw's linear classifiers with the most labels."""
    fitted = [row for row in probed.rows if (row.features, row.classifier, row.budget) in probed.heads]
    best = max((row for row in fitted if row.classifier == fitted[0].classifier), key=lambda row: row.labelled)
    wanted = (best.classifier, best.budget)
    heads = {name: head for (name, *which), head in probed.heads.items() if tuple(which) == wanted}
    name, test = next(iter(probed.tests.items()))
    reader = ShardReader(test.root, config.cache_dir, index=test.index)
    batches = iterate_tiles(
        test.index, reader, test.tiles.samples_N, batch_size=config.batch_size, workers=config.workers
    )
    scores = shift_scores(
        batches, contenders.extractors(config, device), heads, test.tiles, probed.units[name], device=device,
        title=f"shifted tiles of {name}",
    )  # fmt: skip
    return {
        "test": name,
        "classifier": best.classifier,
        "budget": best.budget,
        "settings": {shift.name: shift.setting for shift in SHIFTS},
        "scores": [score.as_dict() for score in scores],
    }
