"""Open labelled train and test sets, and check that they match."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ca2cl.common.redact import redact
from ca2cl.data.loading.sequential import iterate_tiles
from ca2cl.data.loading.stream import BadTile
from ca2cl.data.remote.reader import ShardReader, is_remote, open_index
from ca2cl.data.shards.index import ShardIndex
from ca2cl.errors import InputError
from ca2cl.evaluation.features import Extractor, Features, extract
from ca2cl.evaluation.leaks.find import Side
from ca2cl.evaluation.splits import known_slides
from ca2cl.evaluation.statistics import Units

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProbeSet:
    """One side of a probe: its shards' folder or URL, their index, and the features of their labelled tiles."""

    root: str
    index: ShardIndex
    tiles: Features
    bad: list[BadTile]
    """Labelled tiles that did not decode and are left out."""

    def side(self) -> Side:
        """Its side in a search for leaks."""
        return Side.of(self.index, self.tiles.samples_N.tolist(), self.tiles.pixels_N, self.tiles.fingerprints_ND)

    def describe(self) -> dict[str, Any]:
        """For JSON."""
        manifest = self.index.manifest
        return {
            "shards": self.root,
            "manifest_digest": manifest.digest,
            "source": manifest.source,
            "tiles": len(self.tiles),
            "unlabelled": len(self.index) - len(self.tiles) - len(self.bad),
            "undecodable": {tile.key: tile.reason for tile in self.bad},
        }


def open_sets(train: str, tests: Sequence[str], cache_dir: str | None) -> list[ShardIndex]:
    """Open all indexes, train's first, and refuse what cannot be probed, before any tile is read.

    A test set may lack classes of train (a cohort need not have them all), and have them in another order: its labels
    are numbers in train's classes.

    Raises:
        InputError: not shards, unlabelled, test tiles of a class that train has not, fewer than two classes, a class
            without training tiles, or one test set twice.
    """
    indexes = [open_index(root, cache_dir) for root in (train, *tests)]
    for root, index in zip((train, *tests), indexes, strict=True):
        if not index.classes or (index.labels() < 0).all():
            raise InputError(f"{root}: the tiles have no labels; shard a tree with one folder a class")
    first: dict[str, str] = {}
    for root, index in zip(tests, indexes[1:], strict=True):
        _check_known_classes(train, indexes[0].classes, root, index)
        if first.setdefault(index.manifest.digest, root) != root:
            raise InputError(f"test: {first[index.manifest.digest]} and {root} are the same shards; give each once")
    if len(indexes[0].classes) < 2:
        raise InputError(f"{train}: one class, {indexes[0].classes[0]!r}; a probe needs at least 2")
    check_every_class(train, indexes[0].labels(), indexes[0].classes)
    return [index.relabelled(indexes[0].classes) for index in indexes]


def name_sets(roots: Sequence[str]) -> list[str]:
    """A name for each: its folder's, with as many folders above it as tell all apart. Fit for file and metric names."""
    parts = [[part for part in _public(root).split("/") if part not in ("", ".")] or [root] for root in roots]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]+", "-", "-".join(part[-depth:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}-{part[-1]}" for number, part in enumerate(parts, start=1)]


def _public(root: str) -> str:
    """A folder or URL without what may be secret of it."""
    return redact(root).partition("?")[0] if is_remote(root) else root


def slides_of(index: ShardIndex, samples: Sequence[int], title: str = "") -> list[str] | None:
    """Slide or patient of some tiles, or None where none has one; ``title`` as in ``known_slides``."""
    groups = index.groups()
    return known_slides([groups[sample] for sample in samples], title)


def units_of(index: ShardIndex, samples: Sequence[int], title: str = "") -> Units:
    """Units that some test tiles are resampled by."""
    return Units.of(slides_of(index, samples, title), len(samples))


def _check_known_classes(train: str, classes: list[str], test: str, index: ShardIndex) -> None:
    strange = sorted(set(index.classes) - set(classes))
    if not strange:
        return
    missing = sorted(set(classes) - set(index.classes))
    also = f", and {', '.join(missing)} only in {train}" if missing else ""
    raise InputError(
        f"classes differ between train and test: {', '.join(strange)} only in {test}{also}; no classifier learns a "
        "class without training tiles: name the folders alike, or leave that class's tiles out of the test set"
    )


def missing_classes(labels_N: np.ndarray[Any, np.dtype[np.int64]], classes: Sequence[str]) -> list[str]:
    """The classes that no tile is labelled with."""
    counts = np.bincount(labels_N[labels_N >= 0], minlength=len(classes))
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def describe_missing(names: Sequence[str], test: str = "") -> str:
    """Note on the scores of a test set that lacks classes, in one line; empty where it has all."""
    if not names:
        return ""
    return (
        f"the test set{f' {test}' if test else ''} has no tile of {', '.join(names)}: recalls and AUROC are over the "
        "other classes, and macro F1 counts such a class only where it was predicted"
    )


def check_every_class(root: str, labels_N: np.ndarray[Any, np.dtype[np.int64]], classes: list[str]) -> None:
    """Raise ``InputError`` naming the classes that no tile is labelled with."""
    missing = missing_classes(labels_N, classes)
    if missing:
        raise InputError(
            f"{root}: {(labels_N >= 0).sum()} labelled tiles for {len(classes)} classes, none of {', '.join(missing)}; "
            "every class needs at least one"
        )


def read_set(
    root: str, index: ShardIndex, extractors: Mapping[str, Extractor], device: torch.device, *, cache_dir: str | None,
    batch_size: int, workers: int,
) -> ProbeSet:  # fmt: skip
    """Read every labelled tile once and extract its features.

    Args:
        root: folder or URL of the shards.
        index: theirs.
        extractors: by the name of the features.
        device: where features are computed.
        cache_dir: for remote shards.
        batch_size: tiles at a time.
        workers: decoding processes.

    Raises:
        InputError: no tile decodes.
    """
    samples = np.flatnonzero(index.labels() >= 0)
    if len(samples) < len(index):
        logger.warning("%s: %d tiles without a label are left out", root, len(index) - len(samples))
    reader = ShardReader(root, cache_dir, index=index)
    bad: list[BadTile] = []
    batches = iterate_tiles(index, reader, samples, batch_size=batch_size, workers=workers, on_bad=bad.append)
    tiles = extract(batches, extractors, total=len(samples), device=device, title=f"features of {root}")
    if bad:
        first = f"{bad[0].key} ({bad[0].reason})"
        logger.warning("%s: %d tiles could not be decoded and are left out, %s first", root, len(bad), first)
    return ProbeSet(root, index, tiles, bad)
