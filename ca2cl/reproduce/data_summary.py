"""Summary of the data; a resumed job must match it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ca2cl.common.files import write_record
from ca2cl.common.records import read_fields
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation import datasets
from ca2cl.evaluation.leaks.find import find_leak, side_of
from ca2cl.evaluation.result import ENCODER
from ca2cl.registry.resolve import ResolvedEncoder
from ca2cl.reproduce.config import KEPT, NctConfig

NAME = "data.json"
TEST_TILES = 7180
"""Of CRC-VAL-HE-7K."""


def open_sets(config: NctConfig) -> list[ShardIndex]:
    """The indexes of train and test.

    Raises:
        InputError: classes that differ, or one without tiles.
    """
    train, test = (str(config.shards(name)) for name in config.sets)
    return datasets.open_sets(train, [test], None)


def find_facts(config: NctConfig, found: ResolvedEncoder) -> dict[str, Any]:
    """Digests, classes, numbers of tiles, and what train and test share: as written down, or found and written down.

    Args:
        config: the job's.
        found: the encoder, whose training data the test set is compared with.

    Raises:
        InputError: the data are others than those written down, or the file is damaged.
    """
    indexes = open_sets(config)
    path = config.out / NAME
    digests = [index.manifest.digest for index in indexes]
    if path.exists():
        facts = read_facts(path)
        if facts["digests"] != digests:
            raise InputError(f"{path}: the job began with other tiles than these; use another output_dir")
        return facts
    train, test = indexes
    samples = np.flatnonzero(test.labels() >= 0).tolist()
    sides = (
        side_of(index, ShardReader(index.root, index=index), name, workers=config.workers)
        for index, name in zip(indexes, config.sets, strict=True)
    )
    facts = {
        "sets": list(config.sets),
        "digests": digests,
        "classes": train.classes,
        "tiles": [int((train.labels() >= 0).sum()), len(samples)],
        "test_tiles_published": TEST_TILES,
        "resampled": datasets.units_of(test, samples).as_dict(),
        "train_slides_known": any(name is not None for name in train.groups()),
        "missing_classes": datasets.missing_classes(test.labels(), test.classes),
        "leak": find_leak(*sides, encoders={ENCODER: found}),
    }
    write_record(path, facts, KEPT)
    return facts


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts of an earlier start.

    Raises:
        InputError: the file is damaged.
    """
    return read_fields(path, ("digests", "leak", "tiles"), "delete it and start again")
