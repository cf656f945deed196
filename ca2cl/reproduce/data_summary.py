"""Summary of the data; a resumed job must match it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ca2cl.common.files import write_record
from ca2cl.common.records import read_fields
from ca2cl.data.remote.reader import ShardReader
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.datasets import missing_classes, open_pair
from ca2cl.evaluation.leakage import find_leak, side_of
from ca2cl.evaluation.splits import known_slides
from ca2cl.evaluation.statistics import Units
from ca2cl.reproduce.config import KEPT, NctConfig

NAME = "data.json"
TEST_TILES = 7180
"""Of CRC-VAL-HE-7K."""


def open_sets(config: NctConfig) -> tuple[ShardIndex, ShardIndex]:
    """The indexes of train and test.

    Raises:
        InputError: classes that differ, or one without tiles.
    """
    train, test = (str(config.shards(name)) for name in config.sets)
    return open_pair(train, test, None)


def find_facts(config: NctConfig) -> dict[str, Any]:
    """Digests, classes, numbers of tiles, and what train and test share: as written down, or found and written down.

    Raises:
        InputError: the data are others than those written down.
    """
    indexes = open_sets(config)
    path = config.out / NAME
    digests = [index.manifest.digest for index in indexes]
    facts = read_facts(path)
    if facts is not None:
        if facts["digests"] != digests:
            raise InputError(f"{path}: the job began with other tiles than these; use another output_dir")
        return facts
    sides = (
        side_of(index, ShardReader(index.root, index=index), name, workers=config.workers)
        for index, name in zip(indexes, config.sets, strict=True)
    )
    facts = {
        "sets": list(config.sets),
        "digests": digests,
        "classes": indexes[0].classes,
        "tiles": [int((index.labels() >= 0).sum()) for index in indexes],
        "test_tiles_published": TEST_TILES,
        "resampled": Units.of(known_slides(_groups(indexes[1])), int((indexes[1].labels() >= 0).sum())).as_dict(),
        "missing_classes": missing_classes(indexes[1].labels(), indexes[1].classes),
        "leak": find_leak(*sides),
    }
    write_record(path, facts, KEPT)
    return facts


def _groups(index: ShardIndex) -> list[str | None]:
    """Of the labelled tiles."""
    return [group for group, label in zip(index.groups(), index.labels().tolist(), strict=True) if label >= 0]


def read_facts(path: Path) -> dict[str, Any] | None:
    """What was written down, or None.

    Raises:
        InputError: the file is damaged.
    """
    if not path.exists():
        return None
    return read_fields(path, ("digests", "leak", "tiles"), "delete it and start again")
